"""What is read is never run: no pickle is opened, and no model brings code of its own."""

import ast
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401  # whose workers know Arrow's extension types of Ray
import torch
from fsspec.implementations.memory import MemoryFile
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from crooked import Marker
from jobs import ROOT, write_recipe
from lora_embed import load_encoder
from lora_embed.config.models import load_recipe
from lora_embed.errors import EncoderError, LoraEmbedError, ShardError, StorageError
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather
from lora_embed.store.fetch import fetch_directory
from models import save_adapter, save_base
from samples import png, samples_of, shard_at, tar_of

SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
RUNS_CODE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch.load", "eval", "exec", "os.system"}


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Marker]:
    """A pickle that leaves a file where it is opened; none may be left."""
    marker = Marker(tmp_path / "opened")
    yield marker
    assert not marker.path.exists()


def test_the_marker_is_left_by_a_pickle_that_is_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Marker(tmp_path / "opened")))
    assert (tmp_path / "opened").exists()


def calls_of(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_opens_pickles_or_trusts_remote_code(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imports & RUNS_CODE
    for call in calls_of(tree):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in RUNS_CODE
        assert given.get("allow_pickle", "False") == "False"
        assert given.get("trust_remote_code", "False") == "False"
        assert given.get("shell", "False") == "False"
        if name.endswith("from_pretrained") and name.startswith("Auto"):
            assert given["trust_remote_code"] == "False", f"{name} would ask whoever sits at the terminal"
        if name == "yaml.load":
            assert ast.unparse(call.args[1]) == "Loader"  # a SafeLoader


def write_base(folder: Path, **config: Any) -> Path:
    base = save_base(folder / "base")
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return base


def build(folder: Path, base: Path) -> Path:
    out = folder / "encoder"
    recipe = write_recipe(folder, base, {save_adapter(folder / "ten", save_base(folder / "clean"), 10): 1.0})
    build_encoder(gather(load_recipe(recipe)), out, lambda message: None)
    return out


def test_pickled_weights_beside_others_are_not_opened(tmp_path: Path, marker: Marker) -> None:
    base = write_base(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "rng_state.pth", "tf_model.h5"):
        (base / name).write_bytes(pickle.dumps(marker))
    torch.save({"weight": torch.ones(1)}, base / "pytorch_model-00001-of-00001.bin")
    load_encoder(build(tmp_path, base))


def test_pickled_weights_alone_are_refused(tmp_path: Path, marker: Marker) -> None:
    base = write_base(tmp_path)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(marker))
    with pytest.raises(EncoderError, match=r"pickled weights are never opened"):
        build(tmp_path, base)
    (base / "model.safetensors").write_bytes(pickle.dumps(marker))  # by another name
    with pytest.raises(EncoderError, match=r"is not a whole safetensors file"):
        build(tmp_path, base)


CODE = "from pathlib import Path\nPath({marker!r}).touch()\nfrom transformers import ViTConfig as Own, ViTModel as OwnModel\n"
CLASSES = {"AutoConfig": "own.Own", "AutoModel": "own.OwnModel", "AutoImageProcessor": "own.Own"}


@pytest.mark.parametrize("changes", [{}, {"model_type": "own"}], ids=["a known kind", "a kind of its own"])
def test_code_that_a_model_brings_is_not_run(tmp_path: Path, marker: Marker, changes: dict[str, Any]) -> None:
    """Nor is anybody asked about it: a run at night has nobody to ask."""
    base = write_base(tmp_path, auto_map=CLASSES, **changes)
    (base / "own.py").write_text(CODE.format(marker=str(marker.path)))
    processor = base / "preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"auto_map": CLASSES}))
    if changes:
        with pytest.raises(LoraEmbedError, match=r"model_type 'own', whose code lies beside .* is never run"):
            build(tmp_path, base)
    else:
        load_encoder(build(tmp_path, base))


def test_an_image_processor_of_its_own_is_refused(tmp_path: Path, marker: Marker) -> None:
    base = write_base(tmp_path)
    (base / "own.py").write_text(CODE.format(marker=str(marker.path)))
    (base / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Own", "auto_map": CLASSES}))
    with pytest.raises(LoraEmbedError, match="image processor is 'Own', which this version of transformers does not have"):
        build(tmp_path, base)


def test_pickles_in_an_encoder_are_not_opened(tmp_path: Path, marker: Marker) -> None:
    encoder = build(tmp_path, write_base(tmp_path))
    vectors = next(encoder.rglob("*.npy"))
    for data in (pickle.dumps(marker), object_array(marker)):
        vectors.write_bytes(data)
        with pytest.raises(EncoderError, match="is damaged"):
            load_encoder(encoder)


def object_array(marker: Marker) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([marker], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_pickles_in_a_tar_are_bytes(tmp_path: Path, marker: Marker) -> None:
    """WebDataset's own reader opens `.pkl`, `.pyd`, `.npy` and `.pth`."""
    kinds = ("pkl", "pyd", "pickle", "npy", "npz", "pt", "pth", "ten", "mp")
    data = object_array(marker)
    members = [("a.jpg", pickle.dumps(marker)), *((f"a.{kind}", data) for kind in kinds), ("a.json", pickle.dumps(marker))]
    carry = tuple((kind, "string") for kind in kinds)
    (sample,) = samples_of(shard_at(tmp_path / "a.tar", tar_of(members)), carry=carry)
    assert sample.data == pickle.dumps(marker)
    assert set(sample.fields) == set(kinds)
    assert all(isinstance(value, str) for value in sample.fields.values())


@pytest.mark.parametrize("column", ["key", "label", "nested"])
def test_pickles_in_a_parquet_file_are_not_opened(tmp_path: Path, marker: Marker, column: str) -> None:
    """Ray's workers know an Arrow type whose values are opened when they are looked at."""
    objects: Any = ArrowPythonObjectArray.from_objects([marker])
    if column == "nested":
        objects = pa.StructArray.from_arrays([objects], names=["inner"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png()], column: objects}), path)
    with pytest.raises(ShardError, match=r"pickles, which are never opened"):
        samples_of(shard_at(path), carry=(("label", "string"), ("nested", "string")))


def test_remote_files_are_copied_into_their_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store takes any name."""
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for name in ("config.json", "../../../../outside/config.json"):
        store.store[f"/hostile/{name}"] = MemoryFile(store, f"/hostile/{name}", b"{}")
    with pytest.raises(StorageError, match=r"would be copied to another folder"):
        fetch_directory("memory://hostile", None, ("config.json",))
    assert not list(tmp_path.rglob("config.json"))
