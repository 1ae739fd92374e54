"""Write a table's vectors as an index to search, and open it: FAISS or Lance, by their own libraries."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_embed.config.foreign import parse_record
from lora_embed.config.recognise import INDEX, INPUT, recognise, refuse_other
from lora_embed.errors import ConfigError, StorageError, VerificationFailed
from lora_embed.installed import how_to_install
from lora_embed.search.faiss_index import EMPTY, open_faiss, write_faiss
from lora_embed.search.index import DESCRIPTION, FORMAT, Index, IndexDescription, Nearest
from lora_embed.search.index_files import check_plain
from lora_embed.search.lance_index import open_lance, write_lance
from lora_embed.store.aside import folder_aside
from lora_embed.store.store import Store
from lora_embed.table.parquet import FIND
from lora_embed.text import in_one_line, number_of

if TYPE_CHECKING:
    from lora_embed.table.read import Table


@dataclass(frozen=True)
class Kind:
    """A kind of index: the module that it is written with, how it is written, and how it is opened.

    `write` takes the module, the table, the folder and a seed, and returns the number of vectors and the parameters of the
    index. `open` takes the module, the folder and the description, and checks the files before the module opens them.
    """

    library: str
    write: Callable[[Any, "Table", Path, int], tuple[int, dict[str, Any]]]
    open: Callable[[Any, Path, IndexDescription], Nearest]


KINDS = {name: Kind("faiss", partial(write_faiss, empty), open_faiss) for name, empty in EMPTY.items()} | {
    "lance": Kind("lance", write_lance, open_lance)
}


def export_index(table: "Table", kind: str, out: Path, seed: int = 0) -> IndexDescription:
    """Write an index of a table's version into a new directory, which appears only once the index is complete.

    Raises ConfigError for an unknown kind, a library that is not installed, a directory that is not empty or a table
    without vectors; VerificationFailed if the index does not hold as many vectors as the version.
    """
    if kind not in KINDS:
        *others, last = KINDS
        raise ConfigError(f"{kind!r} is not a kind of index; expected {', '.join(others)} or {last}")
    library = import_library(KINDS[kind].library)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty directory. Name a new one, or remove it.")
    if not table.count:
        raise ConfigError(
            f"{table.store.uri}: version {table.version} holds no vectors, so there is nothing to index. Run its job first."
        )
    Store(str(out.parent)).check_writable()
    try:
        with folder_aside(out) as aside:
            count, parameters = KINDS[kind].write(library, table, aside, seed)
            if count != table.count:
                raise VerificationFailed(
                    f"{table.store.uri}: its files hold {number_of(count, 'vector')}, its manifest says {table.count}. {FIND}"
                )
            description = IndexDescription(
                kind=kind,
                table=table.store.uri,
                version=table.version,
                space_id=table.space_id,
                dimension=table.dimension,
                count=count,
                library=KINDS[kind].library,
                library_version=library.__version__,
                parameters=parameters,
            )
            (aside / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1) + "\n")
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written: {in_one_line(error, 300)}. Free space there, or name another directory."
        ) from None
    return description


def open_index(folder: Path | str) -> Index:
    """Open an index that `export_index` wrote. Raises ConfigError if there is none, or it is damaged."""
    folder = Path(folder)
    description = _read_description(folder)
    kind = KINDS[description.kind]
    return Index(folder, description, kind.open(import_library(kind.library), folder, description))


def _read_description(folder: Path) -> IndexDescription:
    """Read an index's description, after checking that its folder holds only regular files and folders."""
    try:
        check_plain(folder)
        description = parse_record(IndexDescription, (folder / DESCRIPTION).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if recognise(folder) is not INPUT:  # as an index without its description seems to be, by its Parquet file
            refuse_other(folder, INDEX, "an index, which `lora-embed export` makes")
        raise ConfigError(f"{folder}: is not an index: it has no {DESCRIPTION}. Make one with `lora-embed export`.") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{folder}/{DESCRIPTION}: is damaged ({error}). Export the index again.") from None
    if description.format != FORMAT or description.kind not in KINDS or description.metric != "cosine":
        raise ConfigError(
            f"{folder}/{DESCRIPTION}: has another format than {FORMAT}, or another kind than {', '.join(KINDS)}. Export the "
            "index again."
        )
    return description


def import_library(name: str) -> Any:
    """Import FAISS or Lance. Raises ConfigError if it is not installed."""
    try:
        if name == "lance":
            import lance

            return lance
        if name == "faiss":
            import faiss

            return faiss
    except ImportError as error:
        raise ConfigError(f"{name} is not installed ({error}). Install it: {how_to_install('indexes')}") from None
    raise ValueError(f"{name!r} is no library of indexes")
