"""What a process asks of its stores: requests, and bytes in both directions, by the folder below the store's root."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from lora_embed.store.store import Store


@dataclass
class Traffic:
    """Counted so far. Keys are `(root of the store, first folder of the path)`."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes_read: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes_written: Counter[tuple[str, str]] = field(default_factory=Counter)
    paths_read: Counter[str] = field(default_factory=Counter)  # how often each file was opened or read

    def below(self, root: str, *folders: str) -> tuple[int, int, int]:
        """Requests, bytes read and bytes written in these folders of a store; in all of it where none is named."""
        counted = (self.requests, self.bytes_read, self.bytes_written)
        requests, read, written = (
            sum(number for (uri, folder), number in counter.items() if uri == root and (not folders or folder in folders))
            for counter in counted
        )
        return requests, read, written

    def table(self) -> dict[str, dict[str, int]]:
        """For printing: by `root/folder`."""
        keys = sorted(self.requests | self.bytes_read | self.bytes_written)
        return {
            f"{root}/{folder}": {
                "requests": self.requests[root, folder],
                "bytes_read": self.bytes_read[root, folder],
                "bytes_written": self.bytes_written[root, folder],
            }
            for root, folder in keys
        }


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what `Store` does in this process; what Ray's workers do is not seen."""
    traffic = Traffic()
    with ExitStack() as stack:
        for name in ("open", "read", "info", "list_files", "is_directory", "create", "replace", "delete"):
            stack.enter_context(patch.object(Store, name, _counting(traffic, name, getattr(Store, name))))
        yield traffic


def _counting(traffic: Traffic, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(store: Store, first: Any = "", *others: Any, **options: Any) -> Any:
        path = str(first[0] if isinstance(first, list) and first else first or "")
        key = (store.uri, path.partition("/")[0])
        traffic.requests[key] += -(-len(first) // 1000) if isinstance(first, list) else 1  # S3 removes a thousand at once
        found = method(store, first, *others, **options)
        if name in ("open", "read"):
            traffic.paths_read[f"{store.uri}/{path}"] += 1
        if name == "read" and found is not None:
            traffic.bytes_read[key] += len(found)
        if name in ("create", "replace"):
            traffic.bytes_written[key] += len(others[0])
        return _CountedFile(found, traffic, key) if name == "open" else found

    return call


class _CountedFile:
    """An open file whose reads are counted."""

    def __init__(self, file: Any, traffic: Traffic, key: tuple[str, str]) -> None:
        self._file = file
        self._traffic = traffic
        self._key = key

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._traffic.bytes_read[self._key] += len(data)
        return data

    def __enter__(self) -> "_CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
