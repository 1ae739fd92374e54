"""Encoders, adapters and caches by somebody else: each test attacks for real, and looks for what must not have happened."""

import json
import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crooked import Marker
from hostile_encoders import run_campaign
from jobs import write_recipe
from lora_embed import load_encoder
from lora_embed.config.models import load_recipe
from lora_embed.errors import AdapterMismatch, ConfigError, EncoderError, StorageError, TableError
from lora_embed.evaluate.candidates import find_entrants
from lora_embed.model import endless, golden
from lora_embed.model.adapter import read_adapter
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import check_base, find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.description import FILES, read_description
from lora_embed.model.encoder import Encoder, golden_pixels, load_members
from lora_embed.model.fold import Limit
from lora_embed.model.ingredients import gather
from lora_embed.model.match import match_adapter, target_of
from lora_embed.model.peft_private import named_by, targeting
from lora_embed.run.encoders import find_source, named_base, store_encoder
from lora_embed.store.fetch import cache_root, fetch_directory, private_folder
from lora_embed.store.store import Store
from models import save_adapter, save_base

SECRET = "the secret of another folder"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and the encoder of both, whole and kept as an adapter."""
    root = tmp_path_factory.mktemp("made")
    base = save_base(root / "base")
    recipe = load_recipe(write_recipe(root, base, {save_adapter(root / "ten", base): 1.0}))
    for name, limit in (("whole", None), ("kept", Limit())):
        build_encoder(gather(recipe), root / name, lambda line: None, limit)
    return root


@pytest.fixture
def encoder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "whole", tmp_path / "encoder"))


@pytest.fixture
def kept(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "kept", tmp_path / "kept"))


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "ten", tmp_path / "adapter"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def publish(encoder: Path, table: Path) -> set[str]:
    """Copy an encoder to a table, as a run does; what is there then."""
    find_source(str(encoder))
    store_encoder(encoder, Store(str(table)))
    return {path.relative_to(table).as_posix() for path in table.rglob("*") if path.is_file()}


# Ids and fields of encoder.json


@pytest.mark.parametrize("field", ["space_id", "recipe_id"])
@pytest.mark.parametrize(
    "value",
    [
        "../../outside",
        "/abs/olute",
        "ABCDEF012345",
        "abcdef01234",
        "abcdef012345\n",
        "memory://abcdef",
        "٠١٢٣٤٥٦٧٨٩٠١",
        12,
        None,
        ["a"],
    ],
)
def test_an_id_that_is_none_writes_nowhere(encoder: Path, tmp_path: Path, field: str, value: Any) -> None:
    edit(encoder / "encoder.json", **{field: value})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(EncoderError, match=rf"encoder.json: {field} is .* build the encoder again"):
        publish(encoder, tmp_path / "table" / "deep")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("members", ["../elsewhere"]),
        ("members", ["/tmp"]),
        ("members", [".", "."]),
        ("members", "."),
        ("dimension", "8"),
        ("dimension", 2**40),
        ("prefix_tokens", -1),
        ("pooling", "all"),
        ("normalize", 0),
        ("tap", "a" * 10_000),
        ("tap", None),
        ("space_version", 0),
        ("base", {"uri": "x", "revision": None, "content_hash": "../x"}),
        ("base", []),
        ("preprocessing", {}),
        ("preprocessing", None),
        ("arithmetic", {"name": 3}),
        ("arithmetic", []),
    ],
)
def test_a_field_of_another_kind_is_named(encoder: Path, field: str, value: Any) -> None:
    edit(encoder / "encoder.json", **{field: value})
    says = rf"encoder.json: (preprocessing.)?{field}.*([Bb]uild the encoder again|Use the newer release)"
    with pytest.raises(EncoderError, match=says):
        load_encoder(encoder)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": [10**9, 10**9]},
        {"crop": [0, 8]},
        {"crop": None, "resize": 8},
        {"resample": 77},
        {"add": [float("nan"), 0.0, 0.0]},
    ],
)
def test_a_geometry_that_no_image_has_is_refused(encoder: Path, changes: dict[str, Any]) -> None:
    about = json.loads((encoder / "encoder.json").read_text())
    edit(encoder / "encoder.json", preprocessing=about["preprocessing"] | changes)
    with pytest.raises(EncoderError, match=r"encoder.json: preprocessing"):
        load_encoder(encoder)


@pytest.mark.parametrize("space_id", ["../../outside", "ABCDEF012345", 7, None])
def test_the_record_of_a_recipe_leads_nowhere_else(encoder: Path, tmp_path: Path, space_id: Any) -> None:
    table, recipe_id = tmp_path / "table", read_description(encoder).recipe_id
    (table / "recipes").mkdir(parents=True)
    (table / "recipes" / f"{recipe_id}.json").write_text(json.dumps({"space_id": space_id}))
    with pytest.raises(TableError, match=rf"recipes/{recipe_id}.json: .*space_id"):
        publish(encoder, table)


# Files and links


def test_only_what_an_encoder_consists_of_is_copied(encoder: Path, tmp_path: Path) -> None:
    expected = {path.relative_to(encoder).as_posix() for path in encoder.rglob("*") if path.is_file()}
    for name in ("sitecustomize.py", ".env", "golden/x.jpg", "pytorch_model.bin", "more.safetensors", "deep/config.json"):
        (encoder / name).parent.mkdir(exist_ok=True)
        (encoder / name).write_text(SECRET)
    space_id, recipe_id = read_description(encoder).space_id, read_description(encoder).recipe_id
    copied = publish(encoder, tmp_path / "table")
    assert copied == {f"encoders/{space_id}/{name}" for name in expected} | {f"recipes/{recipe_id}.json"}
    assert load_encoder(tmp_path / "table" / "encoders" / space_id).space_id == space_id


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml", "merge_report.json", "config.json", "golden/ramp.jpg", "golden"])
@pytest.mark.parametrize("how", ["file", "relative", "nothing", "pipe"])
def test_a_link_in_an_encoder_copies_no_secret(encoder: Path, tmp_path: Path, name: str, how: str) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text(SECRET)
    os.mkfifo(private / "pipe")
    path = encoder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    targets = {
        "file": private / "key",
        "relative": Path("../private/key"),
        "nothing": private / "none",
        "pipe": private / "pipe",
    }
    path.symlink_to(private if name == "golden" else targets[how])
    with pytest.raises(StorageError, match=rf"{name}: is a link"):
        publish(encoder, tmp_path / "table")
    assert not [path for path in (tmp_path / "table").rglob("*") if path.is_file() and SECRET in path.read_text("latin-1")]
    if not name.endswith((".md", ".yaml")) and name != "merge_report.json":  # what loading reads
        with pytest.raises(StorageError, match=rf"{name}: is a link"):
            load_encoder(encoder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero"), lambda path: Path(path).symlink_to(path)]
)
def test_a_pipe_or_device_in_an_adapter_is_not_waited_for(adapter: Path, name: str, make: Callable[[Path], None]) -> None:
    (adapter / name).unlink()
    make(adapter / name)
    started = time.monotonic()
    with pytest.raises(StorageError, match=rf"{name}: is (a link|not an ordinary file)"):
        read_adapter(str(adapter))
    assert time.monotonic() - started < 10


def in_hub_cache(folder: Path, hub: Path) -> Path:
    """The same files as the hub's library keeps them: a snapshot of links to blobs."""
    snapshot = hub / "models--someone--thing" / "snapshots" / ("c" * 40)
    (hub / "models--someone--thing" / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = shutil.copy(file, hub / "models--someone--thing" / "blobs" / f"{number:040x}")
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_what_lies_in_the_hubs_cache_is_read_through_its_links(made: Path, tmp_path: Path) -> None:
    """Base, adapter and encoder, each a snapshot of links; the adapter's encoder copies as files."""
    base = in_hub_cache(made / "base", tmp_path / "hub1")
    assert find_base(str(base), None).content_hash == find_base(str(made / "base"), None).content_hash
    assert (
        read_adapter(str(in_hub_cache(made / "ten", tmp_path / "hub2"))).content_hash
        == read_adapter(str(made / "ten")).content_hash
    )
    encoder = in_hub_cache(made / "whole", tmp_path / "hub3")
    assert load_encoder(encoder).space_id == read_description(made / "whole").space_id
    publish(encoder, tmp_path / "table")
    assert not [path for path in (tmp_path / "table").rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("target", ["secret", "../../../../secret", "../../blobs/../../../secret", "../../blobs/link"])
def test_a_link_of_a_snapshot_leads_to_its_blobs_alone(made: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text(SECRET)
    base = in_hub_cache(made / "base", tmp_path / "hub")
    (base.parent.parent / "blobs" / "link").symlink_to(tmp_path / "secret")
    (base / "config.json").unlink()
    (base / "config.json").symlink_to(tmp_path / target if target == "secret" else target)
    with pytest.raises(StorageError, match=r"config.json: is (a link|not an ordinary file)"):
        find_base(str(base), None)


# Weights: what was hashed is what is opened


def sharded(base: Path, out: Path) -> Path:
    """The same base in two files with an index."""
    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, out / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def test_a_base_in_several_files_is_the_same_base(made: Path, tmp_path: Path) -> None:
    parts = sharded(made / "base", tmp_path / "parts")
    one, two = (load_headless(folder, "base").state_dict() for folder in (made / "base", parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "named",
    [
        "weights.bin",
        "../base/model.safetensors",
        "/etc/x.safetensors",
        "x/model.safetensors",
        ".safetensors",
        "gone.safetensors",
        "",
        3,
    ],
)
def test_an_index_that_names_another_file_opens_it_not(made: Path, tmp_path: Path, named: Any) -> None:
    base = sharded(made / "base", tmp_path / "parts")
    marker = Marker(tmp_path / "opened")
    (base / "weights.bin").write_bytes(pickle.dumps(marker))
    (base / "x").mkdir()
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copy(made / "base" / "model.safetensors", base / "x")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"][min(index["weight_map"])] = named
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for act in (lambda: find_base(str(base), None), lambda: load_headless(base, "base")):
        with pytest.raises(
            EncoderError, match=r"model.safetensors.index.json names .* (other files are not opened|but that file is not there)"
        ):
            act()
    assert not marker.path.exists()


def test_two_bases_with_other_weights_have_two_hashes(made: Path, tmp_path: Path) -> None:
    """The index chooses between two whole sets of weights that lie in both folders."""
    found = []
    for chosen in ("a.safetensors", "b.safetensors"):
        base = Path(shutil.copytree(made / "base", tmp_path / chosen))
        (base / "model.safetensors").rename(base / "a.safetensors")
        tensors = {name: tensor + 1 for name, tensor in load_file(base / "a.safetensors").items()}
        save_file(tensors, base / "b.safetensors", metadata={"format": "pt"})
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, chosen)}))
        weight = next(load_headless(base, "base").parameters())
        found.append((find_base(str(base), None).content_hash, float(weight.detach().sum())))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_an_adapter_beside_a_model_is_not_applied(made: Path, tmp_path: Path) -> None:
    """transformers looks for one in every folder that it is told."""
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    before = load_headless(base, "base").state_dict()
    for file in (made / "ten").iterdir():
        shutil.copy(file, base)
    after = load_headless(base, "base").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = find_base(str(base), None)
    assert found.content_hash == find_base(str(made / "base"), None).content_hash
    check_base(found)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transformers_weights", "adapter_model.bin"),
        ("transformers_weights", "../base/model.safetensors"),
        ("configuration_files", ["config.5.0.0.json"]),
        ("quantization_config", {"quant_method": "awq"}),
        ("attn_implementation", "someone/kernel"),
        ("_attn_implementation", "someone/kernel@main:forward"),
        ("num_hidden_layers", 10**9),
        ("num_labels", 10**9),
        ("hidden_size", 10**6),
        ("image_size", 10**7),
    ],
)
def test_a_configuration_opens_nothing_else_and_takes_no_time(made: Path, tmp_path: Path, field: str, value: Any) -> None:
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    edit(base / "config.json", **{field: value})
    started = time.monotonic()
    with pytest.raises(EncoderError, match=r"config.json|cannot be loaded"):
        load_headless(base, "base")
    assert time.monotonic() - started < 10


# Patterns


ENDLESS = [r"(([a-z_0-9.]+)+)+!", r"(([a-z]|[a-z][a-z]|[_0-9.])+)+!", r"(?:.*.*.*)*!", r"(((\w+|\.)*)*)*\d{9}!"]


FIELDS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "layers_pattern")


@pytest.mark.parametrize(
    ("field", "pattern"),
    [*((field, ENDLESS[0]) for field in FIELDS), *(("target_modules", pattern) for pattern in ENDLESS[1:])],
)
def test_a_pattern_without_end_is_refused_in_time(adapter: Path, made: Path, field: str, pattern: str) -> None:
    changes: dict[str, Any] = {field: [pattern]}
    if field in ("rank_pattern", "alpha_pattern"):
        changes = {field: {pattern: 4}}
    elif field in ("target_modules", "exclude_modules"):
        changes = {field: pattern}
    elif field == "layers_pattern":
        changes["layers_to_transform"] = [0, 1]
    edit(adapter / "adapter_config.json", **changes)
    saved, target = read_adapter(str(adapter)), target_of(find_base(str(made / "base"), None))
    started = time.monotonic()
    with pytest.raises(AdapterMismatch, match=r"of adapter_config.json: matching its pattern takes more than"):
        match_adapter(saved, target)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "x{99999999999}", "(" * 3000 + ")" * 3000, r"(?P<a>x)(?P<a>y)"])
def test_a_pattern_that_is_none_is_refused(adapter: Path, made: Path, pattern: str) -> None:
    edit(adapter / "adapter_config.json", alpha_pattern={pattern: 4})
    with pytest.raises(AdapterMismatch, match=r"of adapter_config.json: the pattern .* cannot be read"):
        match_adapter(read_adapter(str(adapter)), target_of(find_base(str(made / "base"), None)))


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"layers\.0\.attention\.q_proj",
        r"layers\.(0|1)\..*q_proj",
        r"(?!.*head).*q_proj",
        r"^layers.\d+.attention.[qv]_proj",
        ".*",
    ],
)
def test_patterns_that_end_match_as_peft_matches(adapter: Path, made: Path, pattern: str) -> None:
    """What the child tries changes nothing of what PEFT then says."""
    names = [f"layers.{number}.attention.{name}" for number in range(12) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert endless.problem_with([[("match", rf"(.*\.)?({pattern})$", pattern)]], names) is None
    edit(adapter / "adapter_config.json", alpha_pattern={pattern: 4})
    matched = match_adapter(read_adapter(str(adapter)), target_of(find_base(str(made / "base"), None)))
    scales = {
        name.removesuffix(".weight"): change.scale for name, change in matched.changes.items() if hasattr(change, "scale")
    }
    owners = {place: own.removesuffix(".weight") for own, place in matched.places.items()}
    expected = {name for name in scales if named_by({pattern: 1}, owners[f"{name}.weight"]) == pattern}
    assert {name for name, scale in scales.items() if scale == 1.0} == expected
    assert expected or pattern.startswith("^")
    is_targeted = targeting({"target_modules": pattern})
    assert all(is_targeted(name) == bool(re.fullmatch(pattern, name)) for name in names)


def test_many_plain_patterns_end_too(adapter: Path, made: Path) -> None:
    edit(adapter / "adapter_config.json", rank_pattern={f"layers.{number}.x": 4 for number in range(100_000)})
    started = time.monotonic()
    with pytest.raises(AdapterMismatch, match=r"matching its pattern takes more than"):
        match_adapter(read_adapter(str(adapter)), target_of(find_base(str(made / "base"), None)))
    assert time.monotonic() - started < 10


# Places that an encoder names


class Listener:
    """A port that counts who comes, and answers nothing but redirects to another place."""

    def __init__(self, location: str = "") -> None:
        seen: list[str] = []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(self.path)
                self.send_response(302 if location else 404)
                self.send_header("Location", location + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.seen = seen
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


@pytest.mark.parametrize(
    "place", ["http://127.0.0.1:{port}/m", "simplecache::http://127.0.0.1:{port}/m", "s3://bucket/m", "memory://m"]
)
def test_a_base_that_an_encoder_names_is_asked_of_no_server(kept: Path, listener: Listener, place: str) -> None:
    uri = place.format(port=listener.port)
    about = json.loads((kept / "encoder.json").read_text())
    edit(kept / "encoder.json", base=about["base"] | {"uri": uri})
    for act in (lambda: load_encoder(kept), lambda: named_base(kept)):
        with pytest.raises(
            EncoderError, match=r"which is on another store, .* If you trust it, name it yourself: as base of load_enc"
        ):
            act()
    assert not listener.seen


def test_a_base_is_followed_where_the_user_says_so(
    kept: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by hand, by the environment, or on the encoder's own store."""
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path / "cache"))
    for folder, root in (
        (kept, "memory://one/encoder"),
        (made / "base", "memory://one/base"),
        (made / "base", "memory://two/base"),
    ):
        for file in folder.rglob("*"):
            if file.is_file():
                Store(root).create(file.relative_to(folder).as_posix(), file.read_bytes())
    space_id = read_description(kept).space_id
    with pytest.raises(EncoderError, match="which is on another store, this machine"):
        load_encoder("memory://one/encoder")
    assert load_encoder("memory://one/encoder", base=str(made / "base")).space_id == space_id
    assert load_encoder("memory://one/encoder", base="memory://two/base").space_id == space_id
    monkeypatch.setenv("LORA_EMBED_FOLLOW", f"s3://models {made}/")
    assert load_encoder("memory://one/encoder").space_id == space_id
    monkeypatch.setenv("LORA_EMBED_FOLLOW", f"{made}/other {made}/bas")
    with pytest.raises(EncoderError, match="which is on another store"):
        load_encoder("memory://one/encoder")
    other = save_base(tmp_path / "other", seed=9)
    with pytest.raises(EncoderError, match="whose files have changed since"):
        load_encoder("memory://one/encoder", base=str(other))


def test_a_base_on_the_hub_is_taken_from_its_cache_alone(kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library is given no chance to ask: it would say so, being offline, in other words."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    about = json.loads((kept / "encoder.json").read_text())
    for uri in ("hf://nobody/none", "nobody/none"):
        edit(kept / "encoder.json", base=about["base"] | {"uri": uri})
        with pytest.raises(
            StorageError,
            match=rf"{uri}: is not in the hub's cache, and is not downloaded since an encoder from another store names it",
        ):
            load_encoder(kept)


def test_what_an_encoders_recipe_names_is_asked_of_no_server(
    encoder: Path, listener: Listener, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = (encoder / "recipe.yaml").read_text()
    (encoder / "recipe.yaml").write_text(re.sub(r"path: .*", f"path: http://127.0.0.1:{listener.port}/adapter", recipe))
    (entrant,) = find_entrants([str(encoder)], alone=False)
    assert entrant.ingredients is None
    assert "which is on another store" in capfd.readouterr().err
    assert not listener.seen


@pytest.mark.parametrize("chain", ["", "simplecache::"])
def test_a_redirect_to_another_host_is_not_followed(listener: Listener, chain: str) -> None:
    """Nor to another port, where something else may listen."""
    first = Listener(f"http://127.0.0.1:{listener.port}")
    away = Listener(f"http://localhost:{listener.port}")
    for server in (first, away):
        uri = f"{chain}http://127.0.0.1:{server.port}"
        for act in (
            lambda uri=uri: Store(uri, {"retry_s": 0}).read("config.json"),
            lambda uri=uri: read_adapter(f"{uri}/adapter"),
        ):
            with pytest.raises((StorageError, AdapterMismatch)):
                act()
        assert server.seen
        server.close()
    assert not listener.seen


def test_a_redirect_on_the_same_host_is_followed() -> None:
    server = Listener()
    server.close()
    here = Listener("/again" * 2)
    with pytest.raises((StorageError, FileNotFoundError, ConfigError)):  # too many of them, each followed
        Store(f"http://127.0.0.1:{here.port}", {"retry_s": 0}).open("config.json")
    assert len(here.seen) > 1
    here.close()


# The cache


def planted(made: Path, copy: Path) -> None:
    """Another model in the place of a copy, with golden vectors of its own."""
    tensors = {name: tensor * 1.5 for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    description = read_description(copy)
    model = Encoder(load_members(copy, description, "x"), description, device="cpu", precision="float32", batch_size=4)
    images, _ = golden.load(copy)
    golden.save(copy, images, model.embed_pixels(golden_pixels(images, description.preprocessing)))
    model.check_golden(copy)


@pytest.fixture
def remote(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An encoder that has to be copied, and an empty cache."""
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path / "cache"))
    uri = f"memory://strangers/{tmp_path.name}"
    for file in (made / "whole").rglob("*"):
        if file.is_file():
            Store(uri).create(file.relative_to(made / "whole").as_posix(), file.read_bytes())
    return uri


def test_a_model_that_was_planted_in_the_cache_is_not_loaded(made: Path, remote: str) -> None:
    planted(made, fetch_directory(remote, None, FILES))
    with pytest.raises(EncoderError, match="its files make vectors of space"):
        load_encoder(remote)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
@pytest.mark.parametrize("which", ["fetched", "copy"])
def test_a_cache_that_others_may_write_to_is_not_used(remote: str, mode: int, which: str) -> None:
    copy = fetch_directory(remote, None, FILES)
    (copy if which == "copy" else copy.parent).chmod(mode)
    with pytest.raises(StorageError, match=rf"can be written by other users \(mode {mode:o}, expected 700\)"):
        load_encoder(remote)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("which", ["fetched", "copy", "evaluate"])
def test_a_cache_of_another_user_is_not_used(remote: str, which: str, tmp_path: Path) -> None:
    copy = fetch_directory(remote, None, FILES)
    (cache_root() / "evaluate").mkdir()
    os.chown({"fetched": copy.parent, "copy": copy, "evaluate": cache_root() / "evaluate"}[which], 65534, 65534)
    with pytest.raises(StorageError, match=r"belongs to user 65534, expected user 0"):
        private_folder("evaluate") if which == "evaluate" else load_encoder(remote)


@pytest.mark.parametrize("which", ["fetched", "copy"])
def test_a_link_in_the_place_of_the_cache_is_not_used(remote: str, which: str, tmp_path: Path) -> None:
    copy = fetch_directory(remote, None, FILES)
    place = copy if which == "copy" else copy.parent
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is a link or a file, expected a directory"):
        load_encoder(remote)


@pytest.mark.parametrize("how", ["link", "link to nothing", "pipe", "hard link"])
def test_a_lock_truncates_nothing(remote: str, tmp_path: Path, how: str) -> None:
    lock = fetch_directory(remote, None, FILES).with_suffix(".lock")
    lock.unlink()
    precious = tmp_path / "precious"
    precious.write_text(SECRET)
    if how == "hard link":
        os.link(precious, lock)
        load_encoder(remote, check=False)
    else:
        os.mkfifo(lock) if how == "pipe" else lock.symlink_to(precious if how == "link" else tmp_path / "made")
        with pytest.raises(StorageError, match=r"cannot be copied there"):
            load_encoder(remote)
    assert precious.read_text() == SECRET
    assert not (tmp_path / "made").exists()


def test_folders_of_the_cache_are_this_users_alone(remote: str) -> None:
    previous = os.umask(0)
    try:
        copy = fetch_directory(remote, None, FILES)
    finally:
        os.umask(previous)
    for folder in (copy, copy.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    copy.parent.chmod(0o755)  # as they were before
    fetch_directory(remote, None, FILES)
    assert copy.parent.stat().st_mode & 0o777 == 0o700


# The page of an encoder


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        ("<script>alert(1)</script>", "<script"),
        ("x | <img src=http://a/b> |", "<img"),
        ("![](http://a/b.png)", "![]("),
        ("a\n\n# Heading\n<iframe>", "\n# Heading"),
        ("`</code><b>`", "<b>"),
        ("[here](javascript:alert(1))", "[here]("),
    ],
)
def test_what_an_adapter_calls_its_base_is_words_on_the_page(adapter: Path, made: Path, words: str, absent: str) -> None:
    edit(adapter / "adapter_config.json", base_model_name_or_path=words)
    out = adapter.parent / "built"
    build_encoder(gather(load_recipe(write_recipe(adapter.parent, made / "base", {adapter: 1.0}))), out, lambda line: None)
    page = (out / "README.md").read_text()
    assert absent not in page
    assert "trained on" in page
    assert json.loads((out / "merge_report.json").read_text())["members"][0]["adapters"][0]["trained_on"] == words


def test_a_name_of_a_base_that_is_none_is_refused(adapter: Path) -> None:
    for value in ({"a": 1}, ["x"], 3, "x" * 100_000):
        edit(adapter / "adapter_config.json", base_model_name_or_path=value)
        with pytest.raises(AdapterMismatch, match=r"base_model_name_or_path of adapter_config.json is"):
            read_adapter(str(adapter))


# All of it at random


def test_bent_encoders_and_adapters_load_or_are_refused(tmp_path: Path) -> None:
    findings = run_campaign(tmp_path, seed=1, count=100)
    assert not findings.failures, findings.describe()
    assert len(findings.outcomes) >= 6, findings.describe()
