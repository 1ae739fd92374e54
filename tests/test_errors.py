"""User errors through the real entry point: one message with what, where and what to do, and nothing written.

`docs/errors.md` lists the same cases with their messages: LORA_EMBED_WRITE_DOCS=1 writes them there, else they are compared.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import ROOT, write_tars
from lora_embed import open_table
from lora_embed.chain import cluster
from lora_embed.cli.main import run_command
from lora_embed.config.models import load_job
from lora_embed.run.job import run_job
from lora_embed.search.export import export_index
from lora_embed.store import remote
from models import edit_tensors, save_adapter, save_base
from samples import png, tar_of

LIMIT_S = 10.0  # for one error; those found by reading alone take a few hundredths
DOCS = ROOT / "docs" / "errors.md"
WRITES_DOCS = os.environ.get("LORA_EMBED_WRITE_DOCS") == "1"
NEUTRAL = "/data/products"  # in the docs, the folder of a setup
# Parts of messages that differ between machines, or that other libraries wrote; `…` in the docs.
VARYING = re.compile(
    "|".join(
        [
            r"(?<=can be read \().+(?=\)\. Check the name)",
            r"(?<=pixels \().+(?=\)\. Correct image_size)",
            r"(?<=safetensors file \().+(?=\)\. )",
            r"(?<=cannot be loaded: ).+(?=\. Copy or)",
            r"(?<=is damaged \().+(?=\)\. )",
            r"(?<=/products)\?[^\"]+",
            r"(?<=storage option: ).+(?= unexpected)",
            r"(?<=not_an_image \().+(?=\)\. )",
            r"\b[0-9a-f]{12,}\b",
        ]
    ),
    re.DOTALL,
)
ORDINARY_USER = 65534
KEYS = {"key": "k", "secret": "s"}
NOWHERE = KEYS | {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"total_max_attempts": 1}}}
RECIPE = {"base_model": "./base", "adapters": [{"path": "./ten", "weight": 0.5}, {"path": "./more", "weight": 0.5}]}
JOB = {
    "recipe": "recipe.yaml",
    "input": "shards",
    "table": "table",
    "precision": "float32",
    "batch_size": 16,
    "resources": {"device": "cpu", "actors": {"max": 1}},
}


@dataclass(frozen=True)
class Setup:
    """A good job in a folder of its own, to be broken."""

    folder: Path

    def job(self, **changes: Any) -> None:
        write_yaml(self.folder / "job.yaml", JOB | changes)

    def recipe(self, **changes: Any) -> None:
        write_yaml(self.folder / "recipe.yaml", RECIPE | changes)

    def text(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def processor(self, **settings: Any) -> None:
        self.text("base/preprocessor_config.json", json.dumps(settings))

    def adapter_config(self, **changes: Any) -> None:
        path = self.folder / "ten" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        edit_tensors(self.folder / "ten", change)

    def remove(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def cut(self, name: str) -> None:
        path = self.folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def list(self, name: str, text: str, **changes: Any) -> None:
        """The job's input is a list of references."""
        (self.folder / name).parent.mkdir(parents=True)
        (self.folder / name).write_text(text)
        self.job(input=name, **changes)

    def move(self, name: str, target: str) -> None:
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(self.folder / target)


@dataclass(frozen=True)
class Case:
    """One user error: its name in the docs, what breaks a good setup, and what the message must say."""

    what: str
    breaks: Callable[[Setup], Any]
    says: list[str]  # parts of its message: what, where, what to do
    arguments: list[str] = field(default_factory=lambda: ["run", "job.yaml"])
    code: int = 2  # exit code
    published: bool = False  # the setup's table holds version 1
    builds: bool = False  # shows only when the encoder is built; what was done until then may be told before the message
    starts: bool = False  # needs the cluster; likewise
    as_ordinary_user: bool = False  # root may write anywhere


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def nothing(_setup: Setup) -> None:
    """For what is wrong with the command alone."""


def photo(setup: Setup) -> None:
    (setup.folder / "photo.png").write_bytes(png(1))


def broken_link(setup: Setup) -> None:
    (setup.folder / "shards" / "0002.tar").symlink_to("/gone/0002.tar")


def with_set(*overrides: str) -> list[str]:
    return ["run", "job.yaml", *(part for override in overrides for part in ("--set", override))]


def without_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.0.attention.q_proj.lora_B.weight")}


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, torch.nan) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("q_proj", "wrong_name"): tensor for name, tensor in tensors.items()}


def untrained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def other_base(setup: Setup) -> None:
    base = save_base(setup.folder / "wider", hidden_size=48)
    save_adapter(setup.folder / "wide", base)
    setup.recipe(adapters=[{"path": "./wide"}])


def folder_of_adapters(setup: Setup) -> None:
    setup.move("ten", "all/ten")
    setup.recipe(adapters=[{"path": "./all"}])


def in_parts(setup: Setup) -> None:
    for number in (1, 2):
        name = f"ten/adapter_model-0000{number}-of-00002.safetensors"
        shutil.copy(setup.folder / "ten" / "adapter_model.safetensors", setup.folder / name)
    setup.remove("ten/adapter_model.safetensors")


def with_second(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {n.replace("lora_A", "lora_A.more"): t.clone() for n, t in tensors.items() if "lora_A" in n}


def emptied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(0) if "lora_" in name else tensor for name, tensor in tensors.items()}


def with_fc(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"base_model.model.fc.weight": torch.ones(10, 32)}


def of_two_models(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.replace("vit.", "teacher." if "layers.0" in n else "student."): t for n, t in tensors.items()}


def language_model(setup: Setup) -> None:
    setup.adapter_config(task_type="CAUSAL_LM", base_model_name_or_path="somebody/words-7b")
    setup.tensors(lambda found: {n.replace("vit.layers", "model.blocks"): t for n, t in found.items()})


def ranks_differ(setup: Setup) -> None:
    save_adapter(setup.folder / "rank8", setup.folder / "base", r=8)
    setup.recipe(adapters=[{"path": "./ten"}, {"path": "./rank8"}], merge_method="linear")


def put(setup: Setup, name: str, data: bytes, **changes: Any) -> None:
    """The job's input is a file of its own."""
    (setup.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (setup.folder / name).write_bytes(data)
    setup.job(input=name, **changes)


def without_the_field(setup: Setup) -> None:
    setup.job(carry=["lable"])
    for shard in sorted((setup.folder / "shards").glob("*.tar")):
        shard.write_bytes(tar_of([("a.png", png(1)), ("a.json", b'{"label": "cat"}')]))


def clashing_names(setup: Setup) -> None:
    for folder in ("monday", "tuesday"):
        write_tars(setup.folder / folder, shards=1, images=1)
    setup.job(input=["monday", "tuesday"])


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hold(setup: Setup) -> None:
    path = setup.folder / "table" / "versions" / "00000001.json"
    edit_json(path, held={json.loads(path.read_text())["space_id"]: "search got worse"})


def damage(setup: Setup) -> None:
    path = next((setup.folder / "table" / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1])


def index_of_another_space(setup: Setup) -> None:
    (setup.folder / "photo.png").write_bytes(png(1))
    export_index(open_table(str(setup.folder / "table")), "faiss-flat", setup.folder / "index")
    edit_json(setup.folder / "index" / "index.json", table="table", space_id="0" * 12)


def damaged_index(setup: Setup) -> None:
    photo(setup)
    (setup.folder / "index").mkdir()
    setup.text("index/index.json", "{")


def locked(setup: Setup) -> None:
    setup.folder.chmod(0o755)  # the job itself can be read
    (setup.folder / "locked").mkdir(mode=0o555)
    setup.job(table="locked/table")


RECIPE_CASES = [
    Case("no recipe", lambda s: s.remove("recipe.yaml"), ["/recipe.yaml", "no such file", "path"]),
    Case(
        "the recipe is a directory that is no encoder",
        lambda s: s.job(recipe="ten"),
        ["/ten", "no encoder.json", "lora-embed build"],
    ),
    Case("broken YAML", lambda s: s.text("recipe.yaml", "base_model: [base\n"), ["/recipe.yaml", "line 2", "not valid YAML"]),
    Case(
        "a key twice",
        lambda s: s.text("recipe.yaml", "base_model: a\nbase_model: b\n"),
        ["/recipe.yaml", "line 2", "'base_model'", "twice"],
    ),
    Case(
        "an unknown key in the recipe",
        lambda s: s.recipe(adapters=[{"path": "./ten", "wieght": 1.0}]),
        ["/recipe.yaml", "unknown key 'adapters[0].wieght'", "Did you mean 'weight'?"],
    ),
    Case("an unknown pooling", lambda s: s.recipe(pooling="max"), ["/recipe.yaml", 'pooling is "max"', "patch_mean"]),
    Case(
        "an image size that the base does not take",
        lambda s: s.recipe(image_size=48),
        ["/base", "does not take images of 48×48 pixels", "Correct image_size"],
        builds=True,
    ),
    Case("an image size too small", lambda s: s.recipe(image_size=7), ["/recipe.yaml", "image_size is 7", "at least 8"]),
    Case(
        "a weight that is no number",
        lambda s: s.recipe(adapters=[{"path": "./ten", "weight": float("nan")}]),
        ["/recipe.yaml", "adapters[0].weight is NaN", "finite"],
    ),
    Case("no adapters", lambda s: s.recipe(adapters=[]), ["/recipe.yaml", "adapters is empty", "merge_method to none"]),
    Case("no such base", lambda s: s.recipe(base_model="./bsae"), ["/bsae", "no such directory"]),
    Case(
        "no such base on the hub",
        lambda s: s.recipe(base_model="nobody/no-such-model"),
        ["nobody/no-such-model", "neither a local directory nor a repository", "Check the name"],
    ),
    Case(
        "a base without image preparation",
        lambda s: s.remove("base/preprocessor_config.json"),
        ["/base", "no preprocessor_config.json", "Save the image processor"],
    ),
    Case(
        "a base in the form of timm",
        lambda s: (s.remove("base/preprocessor_config.json"), s.text("base/config.json", '{"pretrained_cfg": {}}')),
        ["/base", "form of the library timm", "form of transformers"],
    ),
    Case(
        "an image processor that transformers does not know",
        lambda s: s.processor(image_processor_type="MyImageProcessor"),
        ["/base/preprocessor_config.json", "'MyImageProcessor', which this version of transformers", "name another base"],
        builds=True,
    ),
    Case(
        "an image processor that is not supported",
        lambda s: s.processor(image_processor_type="VideoMAEImageProcessor"),
        ["/base", "VideoMAEImageProcessor prepares videos", "Name another base"],
        builds=True,
    ),
    Case(
        "an image processor for torchvision alone",
        lambda s: s.processor(image_processor_type="RfDetrImageProcessor"),
        ["/base/preprocessor_config.json", "RfDetrImageProcessor", "torchvision alone", "Name another base"],
        builds=True,
    ),
    Case(
        "an image processor that gives images of different sizes",
        lambda s: s.processor(image_processor_type="ViTImageProcessor", size={"shortest_edge": 32}),
        ["/base", "images of different sizes", "Set image_size in the recipe"],
        builds=True,
    ),
    Case(
        "an image processor that rounds image_size",
        lambda s: (s.processor(image_processor_type="DPTImageProcessor", ensure_multiple_of=14), s.recipe(image_size=32)),
        ["/base", "image_size is 32", "28×28 pixels", "Set image_size: 28"],
        builds=True,
    ),
    Case(
        "an image processor with a wrong setting",
        lambda s: s.processor(image_processor_type="ViTImageProcessor", image_mean=[0.5]),
        ["/base", "image_mean (0.5,)", "one number or three", "Correct the image processor's file"],
        builds=True,
    ),
    Case(
        "a base with pickled weights only",
        lambda s: s.move("base/model.safetensors", "base/pytorch_model.bin"),
        ["/base", "no .safetensors weights", "Save the model again"],
    ),
    Case(
        "`--rank` for a whole model",
        nothing,
        ["--rank", "Add --store adapter"],
        arguments=["build", "recipe.yaml", "--out", "encoder", "--rank", "4"],
    ),
    Case("truncated weights of the base", lambda s: s.cut("base/model.safetensors"), ["/base", "cannot be loaded"]),
]

ADAPTER_CASES = [
    Case("no such adapter", lambda s: s.remove("ten"), ["/ten", "no such directory"]),
    Case(
        "an adapter that is neither here nor said to be on the hub",
        lambda s: s.recipe(adapters=[{"path": "adapters/ten"}]),
        ["adapters[0].path is adapters/ten", "no directory", "/adapters/ten. Correct the path", "write hf://adapters/ten if"],
    ),
    Case(
        "a base that is neither here nor said to be on the hub",
        lambda s: s.recipe(base_model="shards/base"),
        ["base_model is shards/base", "no directory", "/shards/base. Correct the path", "write hf://shards/base if"],
    ),
    Case("no adapter at all", lambda s: s.remove("ten/adapter_config.json"), ["/ten", "no adapter_config.json"]),
    Case(
        "an adapter saved as a pickle",
        lambda s: s.move("ten/adapter_model.safetensors", "ten/adapter_model.bin"),
        ["/ten", "adapter_model.bin", "safe_serialization=True"],
    ),
    Case("a truncated adapter", lambda s: s.cut("ten/adapter_model.safetensors"), ["/ten", "not a whole", "Copy or save"]),
    Case("NaN in an adapter", lambda s: s.tensors(with_nan), ["/ten", "lora_B", "NaN", "use another checkpoint"]),
    Case(
        "a variant of LoRA that is no fixed change of the weights",
        lambda s: s.adapter_config(use_qalora=True),
        ["/ten", "use_qalora=true", "folded exactly", "Merge this adapter"],
    ),
    Case(
        "an unknown merge method",
        lambda s: s.recipe(merge_method="cat"),
        ["merge_method is 'cat'", "weighted_sum, linear", "concat or none"],
    ),
    Case(
        "an option that the method does not have",
        lambda s: s.recipe(merge_method="ties", merge_options={"densty": 0.5}),
        ["merge_options of ties", "unknown key 'densty'", "Did you mean 'density'?"],
    ),
    Case(
        "an adapter named twice",
        lambda s: s.recipe(adapters=[{"path": "./ten"}, {"path": "./ten"}]),
        ["/ten", "the same adapter", "Name it once"],
    ),
    Case(
        "a folder of adapters",
        folder_of_adapters,
        ["/all", "no adapter_config.json", "Its folders ten are", "Name one of them"],
    ),
    Case("an adapter in several files", in_parts, ["/ten", "adapter_model-00001-of-00002", "in several files", "in one file"]),
    Case(
        "an adapter of another method",
        lambda s: s.adapter_config(peft_type="LOHA"),
        ["/ten", "expected a LoRA adapter", "found LOHA", "merge_and_unload"],
    ),
    Case(
        "tensors of two adapters",
        lambda s: s.tensors(with_second),
        ["/ten", "several adapter names", "Save each adapter alone"],
    ),
    Case("empty tensors", lambda s: s.tensors(emptied), ["/ten", "is empty (shape 0)", "DeepSpeed", "save the adapter again"]),
    Case(
        "a quantised adapter",
        lambda s: s.tensors(lambda found: {n: t.to(torch.int8) for n, t in found.items()}),
        ["/ten", "type int8", "expected float64", "without quantisation"],
    ),
    Case(
        "a head of an unusual name",
        lambda s: s.tensors(with_fc),
        ["/ten", "fc.weight", "If they are a task's head, remove them"],
    ),
    Case(
        "an adapter of a text model around the base",
        lambda s: s.tensors(lambda found: {n.replace("vit.", "text_encoder."): t for n, t in found.items()}),
        ["/ten", "'text_encoder' before them is another part of a model"],
    ),
    Case("an adapter of two models", lambda s: s.tensors(of_two_models), ["/ten", "begin differently", "several models"]),
    Case("an adapter of a language model", language_model, ["/ten", "CAUSAL_LM", "language model", "Leave it out"]),
    Case(
        "an adapter without its trained norm",
        lambda s: s.adapter_config(modules_to_save=["layernorm_after"]),
        ["/ten", "names layernorm_after", "no weights of layers.0.layernorm_after", "Save the adapter again"],
    ),
    Case("half of a LoRA pair", lambda s: s.tensors(without_half), ["/ten", "q_proj has no lora_B", "Save the adapter again"]),
    Case("an adapter of another base", other_base, ["/wide", "no weight of", "/base", "the shape 32×32", "name that base"]),
    Case(
        "tensors that match nothing",
        lambda s: s.tensors(renamed),
        ["/ten", "2 of the 6 weights that it changes match no weight", "wrong_name", "names this base", "Save it again from"],
    ),
    Case("an untrained adapter", lambda s: s.tensors(untrained), ["/ten", "change nothing", "leave it out"]),
    Case("a linear merge of unequal ranks", ranks_differ, ["'linear'", "[4, 8]", "Use 'weighted_sum'"], builds=True),
]

INPUT_CASES = [
    Case("no such input", lambda s: s.job(input="sahrds"), ["/sahrds", "no such file or directory"]),
    Case(
        "a pattern that matches no file",
        lambda s: s.job(input="shards/*.zip"),
        ["/shards/*.zip", "matches no tar", "2 files", "Correct the pattern"],
    ),
    Case(
        "a range with files missing",
        lambda s: s.job(input="shards/{0000..0007}.tar"),
        ["{0000..0007}", "6 of the 8 files", "0002.tar", "Correct the range"],
    ),
    Case(
        "a list of images without its key",
        lambda s: s.list("lists/a.csv", "url\nimages/1.jpg\n"),
        ["lists/a.csv", "set reference_column in the job"],
    ),
    Case(
        "a list without the column",
        lambda s: s.list("lists/a.csv", "uri,label\nimages/1.jpg,cat\n", reference_column="url"),
        ["lists/a.csv", "no column 'url'", "['uri', 'label']", "Correct reference_column"],
    ),
    Case(
        "a list that names another place",
        lambda s: s.list("lists/a.csv", "url\ns3://pictures/1.jpg\n", reference_column="url"),
        ["row 1", "s3://pictures/1.jpg", "set reference_roots"],
    ),
    Case(
        "another kind of file", lambda s: s.job(input="recipe.yaml"), ["recipe.yaml", "begins with", "text", "Expected a tar"]
    ),
    Case("a link whose file is gone", broken_link, ["/shards", "0002.tar is a link to /gone/0002.tar", "Fetch the file again"]),
    Case(
        "archives that are not read",
        lambda s: put(s, "packed/photos.zip", b"PK\3\4"),
        ["/packed/photos.zip", "begins with 4 bytes of a zip archive", "only tars are read", "unpack photos.zip"],
    ),
    Case(
        "a folder of archives",
        lambda s: (put(s, "packed/photos.7z", b"7z"), s.job(input="packed")),
        ["/packed", "1 file (.7z 1)", "only tars are read"],
    ),
    Case("an input of 0 bytes", lambda s: put(s, "photos/list", b""), ["/photos/list", "has 0 bytes", "Expected a tar"]),
    Case(
        "a list whose line is no object",
        lambda s: s.list("lists/a.jsonl", '["images/1.jpg"]\n', reference_column="url"),
        ["lists/a.jsonl", "line 1 is", "one JSON object on each line"],
    ),
    Case(
        "a list whose line has more values than columns",
        lambda s: s.list("lists/a.csv", "url,label\nimages/1.jpg,a cat, sleeping\n", reference_column="url"),
        ["lists/a.csv", "line 2 has 3 values", "names 2 columns", "Put quotes around"],
    ),
    Case(
        "a list without rows",
        lambda s: s.list("lists/a.csv", "url\n", reference_column="url"),
        ["lists/a.csv", "no rows", "Write them again"],
    ),
    Case(
        "`reference_column` where there is no list",
        lambda s: s.job(reference_column="url"),
        ["shards", "reference_column is 'url'", "there is no list", "remove reference_column"],
    ),
    Case(
        "a list without the key column",
        lambda s: s.list("lists/a.csv", "url\nimages/1.jpg\n", reference_column="url", key_column="id"),
        ["lists/a.csv", "no column 'id'", "Correct key_column"],
    ),
    Case(
        "a carried field that no sample has",
        without_the_field,
        ["carry names lable", "0000.tar has the fields", "Did you mean 'label'", "Correct carry"],
        builds=True,
    ),
    Case(
        "a web address with a signature",
        lambda s: s.job(input="https://example.org/a.tar?signature=x"),
        ["https://example.org/a.tar?…", "holds a password or a signature", "a list: see reference_column"],
    ),
    Case(
        "a dataset of the hub where HF_HUB_OFFLINE is set",
        lambda s: s.job(input="hf://datasets/owner/name"),
        ["hf://datasets/owner/name", "offline mode is enabled", "`HF_HUB_OFFLINE`"],
    ),
    Case("two images that would share an id", clashing_names, ["duplicate ids", "0000.tar", "Name the folder above both"]),
]

JOB_CASES = [
    Case("no job file", lambda s: s.remove("job.yaml"), ["job.yaml", "no such file", "Correct the path"]),
    Case(
        "an unknown key in the job", lambda s: s.job(chunksize=256), ["job.yaml", "'chunksize'", "Did you mean 'chunk_size'?"]
    ),
    Case(
        "a recipe in place of a job",
        nothing,
        ["recipe.yaml: is a recipe, expected a job", "names it with its key recipe", "build recipe.yaml --out"],
        arguments=["run", "recipe.yaml"],
    ),
    Case(
        "a gate's limit that does not exist",
        lambda s: s.job(gates={"norms": 3}),
        ["gates", "unknown key 'norms'", "norm_factor"],
    ),
    Case(
        "a member of samples named twice",
        lambda s: s.job(image_member=["jpg", ".JPG"]),
        ["job.yaml", "image_member", "different endings"],
    ),
    Case("a missing key", lambda s: s.text("job.yaml", "recipe: r\ninput: i\n"), ["job.yaml", "'table' is missing", "Add it"]),
    Case("a number out of its bounds", lambda s: s.job(chunk_size=0), ["job.yaml", "chunk_size is 0", "at least 1"]),
    Case("a carried field named as a column", lambda s: s.job(carry=["id"]), ["job.yaml", "carry names 'id'", "Rename"]),
    Case("a table in its own input", lambda s: s.job(table="shards/table"), ["job.yaml", "/shards/table", "Move one of them"]),
    Case(
        "`--set` without a value",
        nothing,
        ["--set chunk_size", "expected KEY=VALUE", "for example"],
        arguments=with_set("chunk_size"),
    ),
    Case(
        "`--set` with a wrong value",
        nothing,
        ["--set resources.actors.max=many", '"many"', "a whole number"],
        arguments=with_set("resources.actors.max=many"),
    ),
]

MIXED_CASES = [
    Case(
        "a merge method with a typing error",
        lambda s: s.recipe(merge_method="dare_tie"),
        ["recipe.yaml", "merge_method is 'dare_tie'", "Did you mean 'dare_ties'?"],
    ),
    Case(
        "a word of a list with a typing error",
        lambda s: s.recipe(pooling="patchmean"),
        ["recipe.yaml", 'pooling is "patchmean"', "Did you mean 'patch_mean'?"],
    ),
    Case(
        "a job in place of a recipe",
        nothing,
        ["job.yaml: is a job, expected a recipe", "`lora-embed run job.yaml`"],
        arguments=["build", "job.yaml", "--out", "encoder"],
    ),
    Case(
        "a job that names a job as its recipe",
        lambda s: s.job(recipe="job.yaml"),
        ["job.yaml: is a job, expected a recipe"],
    ),
    Case(
        "an adapter in place of a job",
        nothing,
        ["ten: is an adapter, expected a job", "A recipe names it under adapters"],
        arguments=["run", "ten"],
    ),
    Case(
        "an adapter in place of a recipe",
        nothing,
        ["ten: is an adapter, expected a recipe", "under adapters"],
        arguments=["build", "ten", "--out", "encoder"],
    ),
    Case(
        "a table in place of a job",
        nothing,
        ["table: is a table, expected a job", "with its key table"],
        arguments=["run", "table"],
        published=True,
    ),
    Case(
        "an image in place of a job",
        photo,
        ["photo.png: is an image, expected a job"],
        arguments=["plan", "photo.png"],
    ),
    Case(
        "a recipe in place of a table",
        nothing,
        ["recipe.yaml: is a recipe, expected a job", "build recipe.yaml"],
        arguments=["status", "recipe.yaml"],
    ),
    Case(
        "an adapter in place of a table",
        nothing,
        ["ten: is an adapter, expected a table, or a job file"],
        arguments=["verify", "ten"],
    ),
    Case(
        "a folder of images in place of a table",
        nothing,
        ["shards: is a folder of images, expected a table", "with its key input"],
        arguments=["status", "shards"],
    ),
    Case(
        "a tar in place of a table",
        nothing,
        ["shards/0000.tar: is a file of images, expected a table"],
        arguments=["gc", "shards/0000.tar"],
    ),
    Case(
        "a job whose table is not there yet",
        nothing,
        ["/table: there is no table yet", "`lora-embed run job.yaml` makes it"],
        arguments=["status", "job.yaml"],
    ),
    Case(
        "a base in place of the job's table",
        lambda s: s.job(table="base"),
        ["table", "/base: is a model, expected a table", "with its key base_model"],
    ),
    Case(
        "a table in place of the job's input",
        lambda s: s.job(input="table", table="other"),
        ["input", "/table: is a table, expected tars"],
        published=True,
    ),
    Case(
        "image and table swapped",
        photo,
        ["photo.png is an image", "Write: lora-embed search table photo.png"],
        arguments=["search", "photo.png", "table"],
        published=True,
    ),
    Case(
        "a folder in place of an image",
        nothing,
        ["shards: is a folder of images, expected an image"],
        arguments=["search", "table", "shards"],
        published=True,
    ),
    Case(
        "a table in place of an index",
        photo,
        ["table: is a table, expected an index", "lora-embed export"],
        arguments=["search", "table", "photo.png", "--index", "table"],
        published=True,
    ),
    Case(
        "a job in place of a recipe to evaluate",
        nothing,
        ["job.yaml: is a job, expected a recipe"],
        arguments=["evaluate", "--recipe", "job.yaml", "--data", "shards", "--label", "kind"],
    ),
    Case(
        "a recipe in place of labelled images",
        nothing,
        ["recipe.yaml: is a recipe, expected a job"],
        arguments=["evaluate", "--recipe", "recipe.yaml", "--data", "recipe.yaml", "--label", "kind"],
    ),
    Case(
        "a job in place of a recipe to tune",
        nothing,
        ["job.yaml: is a job, expected a recipe"],
        arguments=["tune", "job.yaml", "--data", "shards", "--label", "kind", "--out", "tuned.yaml"],
    ),
]

TABLE_CASES = [
    Case("a table below a file", lambda s: s.job(table="recipe.yaml/table"), ["/recipe.yaml", "is a file", "below it"]),
    Case("a table that cannot be written", locked, ["/locked", "not writable", "permissions"], as_ordinary_user=True),
    Case(
        "a bucket that cannot be reached",
        lambda s: s.job(table="s3://products/table", table_storage_options=NOWHERE),
        ["s3://products/table", "cannot be reached", "Check network, endpoint and keys"],
    ),
    Case(
        "a storage option that is not known",
        lambda s: s.job(table="s3://products/table", table_storage_options=KEYS | {"endpiont": "http"}),
        ["s3://products/table", "unknown storage option", "'endpiont'", "Options given"],
    ),
    Case("an unknown kind of storage", lambda s: s.job(table="s4://products/table"), ["s4://products/table", "unknown"]),
    Case(
        "a table of another space",
        lambda s: s.recipe(adapters=[{"path": "./ten"}]),
        ["/table", "version 1 holds vectors of space", "never mix", "Name another table"],
        published=True,
        builds=True,
    ),
    Case(
        "another precision than the table's",
        nothing,
        ["/table", "precision 'float32', now 'bfloat16'", "set them back, or name another table"],
        arguments=with_set("precision=bfloat16"),
        published=True,
    ),
    Case("no table there", nothing, ["nowhere: there is no table yet", "Correct"], arguments=["status", "nowhere"]),
    Case(
        "no such version",
        nothing,
        ["table", "no version 9", "lora-embed status"],
        arguments=["verify", "table", "--version", "9"],
        published=True,
    ),
    Case(
        "an encoder's directory that is not empty",
        nothing,
        ["shards", "not empty", "Name another directory"],
        arguments=["build", "recipe.yaml", "--out", "shards"],
    ),
]

VERSION_CASES = [
    Case("nothing to publish", nothing, ["/table", "with this recipe", "lora-embed run"], arguments=["publish", "job.yaml"]),
    Case(
        "a gate let through without a reason",
        nothing,
        ["--accept", "Give the reason with --why"],
        arguments=["publish", "job.yaml", "--accept", "processor"],
    ),
    Case(
        "a rollback to a version that is not there",
        nothing,
        ["table", "no version 9", "Existing versions: 1"],
        arguments=["rollback", "table", "--to", "9", "--why", "search got worse"],
        published=True,
    ),
    Case(
        "a rollback to the current version",
        nothing,
        ["table", "version 1 is already the current version"],
        arguments=["rollback", "table", "--to", "1", "--why", "search got worse"],
        published=True,
    ),
    Case(
        "a space that a rollback holds back",
        hold,
        ["space", "(search got worse)", "Change the recipe", "--release"],
        published=True,
        code=1,
    ),
    Case(
        "an image to forget that is in no version",
        nothing,
        ["table", "'0000.tar/nobody'", "Correct them"],
        arguments=["forget", "table", "0000.tar/nobody", "--why", "its owner asked"],
        published=True,
    ),
    Case(
        "an image to explain that has no vector",
        nothing,
        ["table", "version 1", "'0000.tar/nobody'", "rejects"],
        arguments=["explain", "table", "0000.tar/nobody"],
        published=True,
    ),
    Case(
        "a damaged manifest",
        lambda s: s.cut("table/versions/00000001.json"),
        ["versions/", ".json: is damaged", "Remove it"],
        arguments=["status", "table"],
        published=True,
    ),
    Case(
        "a damaged file",
        damage,
        ["table/data/", "was changed since it was published", "lora-embed rollback"],
        arguments=["verify", "table"],
        published=True,
        code=1,
    ),
]

SEARCH_CASES = [
    Case(
        "no such image",
        nothing,
        ["photo.jpg", "no such file", "Correct the path"],
        arguments=["search", "table", "photo.jpg"],
        published=True,
    ),
    Case(
        "a query that is no image",
        lambda s: s.text("notes", "a text\n"),
        ["notes", "not_an_image", "Give another"],
        arguments=["search", "table", "notes"],
        published=True,
        builds=True,
    ),
    Case(
        "no index there",
        photo,
        ["nowhere", "no index.json", "lora-embed export"],
        arguments=["search", "table", "photo.png", "--index", "nowhere"],
        published=True,
    ),
    Case(
        "a damaged index",
        damaged_index,
        ["index/index.json", "is damaged", "Export the index again"],
        arguments=["search", "table", "photo.png", "--index", "index"],
        published=True,
    ),
    Case(
        "an index of another space",
        index_of_another_space,
        ["index", "version 1", "means nothing", "Export the table's current version again"],
        arguments=["search", "table", "photo.png", "--index", "index"],
        published=True,
        builds=True,
    ),
    Case(
        "an unknown kind of index",
        nothing,
        ["'faiss'", "faiss-hnsw or lance"],
        arguments=["export", "table", "--to", "faiss", "--out", "index"],
        published=True,
    ),
    Case(
        "an index where something is",
        nothing,
        ["shards", "not an empty directory", "Name a new one"],
        arguments=["export", "table", "--to", "faiss-flat", "--out", "shards"],
        published=True,
    ),
]

CLUSTER_CASES = [
    Case(
        "no GPU in the cluster",
        nothing,
        ["resources.device is gpu", "the cluster has no GPU", "set resources.device to cpu"],
        arguments=with_set("resources.device=gpu", "resources.wait_s=0"),
        starts=True,
    ),
    Case(
        "nodes too small for a decode task",
        nothing,
        ["resources.cpus_per_decode is 4096", "largest node", "Set it lower"],
        arguments=with_set("resources.cpus_per_decode=4096"),
        starts=True,
    ),
    Case(
        "more actors than there is room for",
        nothing,
        ["resources.actors", "at least 4,096 actors", "Set resources.actors.min lower"],
        arguments=with_set("resources.actors={min: 4096}"),
        starts=True,
    ),
]

SECTIONS = {  # headings of the docs
    "Recipe": RECIPE_CASES,
    "Adapter": ADAPTER_CASES,
    "Input": INPUT_CASES,
    "Job file and `--set`": JOB_CASES,
    "Typing errors and mixed-up arguments": MIXED_CASES,
    "Table": TABLE_CASES,
    "Versions": VERSION_CASES,
    "Search and indexes": SEARCH_CASES,
    "Cluster": CLUSTER_CASES,
}
CASES = [case for cases in SECTIONS.values() for case in cases]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, two adapters, two shards, a recipe and a job."""
    return make_good(tmp_path_factory.mktemp("good"))


def make_good(folder: Path) -> Path:
    base = save_base(folder / "base")
    save_adapter(folder / "ten", base, 10, seed=1)
    save_adapter(folder / "more", base, 27, seed=2)
    write_tars(folder / "shards", shards=2, images=2)
    Setup(folder).recipe()
    Setup(folder).job()
    return folder


@pytest.fixture(scope="module")
def published(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a published table."""
    return publish(good, tmp_path_factory.mktemp("published") / "good")


def publish(good: Path, folder: Path) -> Path:
    cluster.connect()
    shutil.copytree(good, folder)
    run_job(load_job(folder / "job.yaml"))
    return folder


@pytest.fixture
def broken(case: Case, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A fresh setup with the case's error in it, as the current folder."""
    folder = tmp_path / "products"
    shutil.copytree(request.getfixturevalue("published" if case.published else "good"), folder)
    case.breaks(Setup(folder))
    return folder


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files and folders."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def user(case: Case) -> Iterator[None]:
    """Where the tests run as root: access as it is for an ordinary user, which is asked by the real user's id."""
    if case.as_ordinary_user and os.geteuid() == 0:
        os.setresuid(ORDINARY_USER, -1, -1)
    yield
    if case.as_ordinary_user and os.geteuid() == 0:
        os.setresuid(0, -1, -1)


@pytest.fixture(scope="module")
def messages() -> Iterator[dict[str, str]]:
    """Case → its message, as the docs print it; written to the docs at the end where that is asked for."""
    caused: dict[str, str] = {}
    yield caused
    if WRITES_DOCS:
        page = DOCS.read_text(encoding="utf-8")
        for heading, cases in SECTIONS.items():
            rows = "".join(row(case.what, caused.get(case.what)) for case in cases)
            start = page.index("| --- | --- | --- |\n", page.index(f"\n## {heading}\n")) + len("| --- | --- | --- |\n")
            page = page[:start] + rows + page[start:][re.match(r"(?:\|.*\n)*", page[start:]).end() :]
        DOCS.write_text(page, encoding="utf-8")


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_a_user_error_is_one_message_and_nothing_is_written(
    case: Case,
    broken: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    messages: dict[str, str],
) -> None:
    if case.starts:
        request.getfixturevalue("cluster")
    else:
        monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("a cluster was started for what reading alone shows"))
    monkeypatch.chdir(broken)
    remote._connect_cached.cache_clear()  # it knows `table` in the folder of the case before
    before = everything(broken.parent)
    capsys.readouterr()
    started = time.monotonic()
    code = run_command(case.arguments)
    seconds = time.monotonic() - started
    output, errors = capsys.readouterr()

    assert code == case.code, errors
    assert everything(broken.parent) == before
    assert seconds < LIMIT_S
    assert output == ""
    assert "Traceback" not in errors
    assert errors.count("error: ") == 1
    progress, message = errors.split("error: ")
    message = message.partition("\nend: ")[0]  # what a run that had begun says last
    assert case.builds or case.starts or not progress
    for part in case.says:
        assert part in message
    messages[case.what] = as_documented(message)
    if not WRITES_DOCS:
        assert masked(documented()[case.what][0]) == masked(messages[case.what]), f"{DOCS} has another message"


def as_documented(message: str) -> str:
    """A message as a cell of the docs' tables, without what differs between machines."""
    message = re.sub(r"/tmp\S*?/(good\d*|products)(?=[/:\s])", NEUTRAL, message.strip())
    return cell(VARYING.sub("…", message))


@pytest.mark.skipif(WRITES_DOCS, reason="they are written after the last test")
def test_the_docs_list_exactly_these_cases() -> None:
    assert len({case.what for case in CASES}) == len(CASES)
    assert list(documented()) == [case.what for case in CASES]


def cell(message: str) -> str:
    """A message as a cell of a table in Markdown, each of its lines as code."""
    assert "|" not in message
    return "<br>".join(f"`` {line} ``" if "`" in line else f"`{line}`" for line in message.splitlines())


def row(what: str, message: str | None) -> str:
    """A case's row: its message, or where it was not caused the one that is there, and the advice that is there."""
    before, advice = documented().get(what, ("", ""))
    return f"| {what} | {message or before} | {advice} |\n".replace("|  |", "| |")


def documented() -> dict[str, tuple[str, str]]:
    """First column of the docs' tables of messages → the message's cell, and the advice beside it."""
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+`) \| ([^|]*?) ?\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {what: (message, advice) for what, message, advice in rows}


def masked(text: str) -> str:
    """Text without its numbers, which differ between machines."""
    return re.sub(r"\d+", "#", text)


def test_the_setup_that_the_cases_break_is_good(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(good)
    before = everything(good)
    assert run_command(["plan", "job.yaml"]) == 0
    assert run_command(["plan", "job.yaml", "--set", "recipe=nowhere"]) == 2
    assert everything(good) == before


def test_a_job_script_says_the_same(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    Setup(tmp_path).job(chunksize=256)
    before = everything(tmp_path)
    assert run_command(["run", str(tmp_path / "job.yaml")]) == 2
    command = [sys.executable, str(ROOT / "jobs" / "embed.py"), "--config", str(tmp_path / "job.yaml")]
    script = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=tmp_path)
    assert (script.returncode, script.stdout, script.stderr) == (2, "", capsys.readouterr().err)
    assert everything(tmp_path) == before
