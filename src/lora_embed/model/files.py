"""The files of a model, an adapter or an encoder. Nothing else in their folder is opened, and no link leads out of it.

Folders may come from strangers. All code finds the files that it reads, hashes, copies or loads through this module.
"""

import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_embed.errors import EncoderError, StorageError

WHOLE_MODEL, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the second, if there is also a tokenizer (CLIP)
MOST_JSON = 16 * 2**20  # bytes; the index of a model in thousands of files has 2 MB
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


def own_file(folder: Path, name: str) -> Path | None:
    """The path of a file in a folder; None if the folder has no file of that name.

    Links are followed only in the hub's cache, where snapshots link to the `blobs` of the same repository. Raises
    StorageError for any other link, without a look at its target, and for other than ordinary files: reading a pipe would
    wait for ever.
    """
    root = os.path.realpath(folder)
    path = os.path.join(root, name)
    try:
        for parent in Path(name).parents[:-1]:
            if os.path.islink(os.path.join(root, parent)):
                raise _link_refused(folder / parent)
        state = os.lstat(path)
        if stat.S_ISLNK(state.st_mode):
            target = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
            if os.path.dirname(target) != _blobs_of(root):
                raise _link_refused(folder / name)
            state = os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise not_readable(folder / name, error) from None
    if stat.S_ISDIR(state.st_mode):
        return None
    if not stat.S_ISREG(state.st_mode):
        raise StorageError(f"{folder / name}: is not an ordinary file. Remove it, or copy the folder again.")
    return folder / name


def not_readable(path: Path, error: OSError | ValueError) -> StorageError:
    """What to say of a file that exists and cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"{path}: cannot be read ({reason}). Check its permissions and the disk.")


def _link_refused(path: Path) -> StorageError:
    return StorageError(
        f"{path}: is a link. In the folder of a model, adapter or encoder, links are followed only in the hub's cache. "
        "Replace the link with the file itself."
    )


def _blobs_of(root: str) -> str | None:
    """The folder with the files of a snapshot in the hub's cache: `…/snapshots/<commit>/…` → `…/blobs`."""
    repository, separator, _ = root.rpartition(f"{os.sep}snapshots{os.sep}")
    return os.path.join(repository, "blobs") if separator else None


def read_json(path: Path) -> Any:
    """A file's content. Raises ValueError if it is not JSON, is nested too deeply, or is larger than any such file.

    Raises StorageError if the file cannot be read.
    """
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(f"it has {size:,} bytes; at most {MOST_JSON:,} are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise not_readable(path, error) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def weight_files(folder: Path, where: str) -> tuple[Path, ...]:
    """The safetensors files that a model is loaded from: `model.safetensors`, else the files that its index names.

    Raises EncoderError, naming `where`, if there are none, or if the index names other than safetensors files beside it.
    """
    if (whole := own_file(folder, WHOLE_MODEL)) is not None:
        return (whole,)
    index = own_file(folder, MODEL_INDEX)
    if index is None:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if others:
            raise EncoderError(
                f"{where}: has no weights that a model is loaded from; found {others[0]}, which is neither {WHOLE_MODEL} nor "
                f"named by a {MODEL_INDEX}. If these are all its weights, rename the file to {WHOLE_MODEL}; otherwise copy the "
                "model again."
            )
        raise EncoderError(f"{where}: has no .safetensors weights (pickled weights are never opened). Save the model again.")
    files = []
    for name in _named_by(index, where):
        if not _SHARD.fullmatch(name):
            raise EncoderError(
                f"{where}: {MODEL_INDEX} names {name[:200]!r}, expected .safetensors files beside it; other files are not "
                "opened. Copy or save the model again."
            )
        if (file := own_file(folder, name)) is None:
            raise EncoderError(f"{where}: {MODEL_INDEX} names {name[:200]!r}, but that file is not there. Copy or download it.")
        files.append(file)
    return tuple(files)


def _named_by(index: Path, where: str) -> list[str]:
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{where}: {index.name} is damaged ({str(error)[:200]}). Copy or save it again.") from None
    if not names:
        raise EncoderError(f"{where}: {index.name} names no files. Copy or save the model again.")
    return names


def model_files(folder: Path, where: str) -> list[Path]:
    """All files that a model is loaded from: its configuration, its image processor and its weights."""
    return [*own_files(folder, (MODEL_CONFIG, *PROCESSOR_FILES)), *weight_files(folder, where)]


def own_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names that exist in a folder. Raises like `own_file`."""
    return [path for name in names if (path := own_file(folder, name)) is not None]
