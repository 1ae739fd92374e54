"""A job that is done but for one chunk in a hundred: what finishing it costs against the whole, and the bytes it reads.

Tars lie in S3 behind a forwarder that counts bytes; the table lies on the local disk. So what passes is what was read.
"""

import socket
import statistics
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contestants import Setting, command_of_ours, finish
from places import s3_place

PIECE = 1 << 18


class Forwarder:
    """Passes TCP connections on to a server on this machine and counts the bytes that come back."""

    def __init__(self, endpoint: str) -> None:
        self._upstream = (urlsplit(endpoint).hostname or "", urlsplit(endpoint).port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = 0  # bytes from the server

    def __enter__(self) -> "Forwarder":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):  # either side left
            while data := source.recv(PIECE):
                if counts:
                    with self._lock:
                        self.received += len(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def measure_resume(setting: Setting, shards: list[Path], folder: Path, repeats: int) -> dict[str, Any]:
    """Embed all without publishing, then take one part away and run the same command again, `repeats` times."""
    with s3_place(shards, folder) as store, Forwarder(store.environment["AWS_ENDPOINT_URL"]) as forwarder:
        environment = store.environment | {"AWS_ENDPOINT_URL": forwarder.endpoint}
        setting = replace(setting, place=replace(setting.place, inputs=store.inputs, environment=environment))
        job = folder / "resumed"
        job.mkdir()
        command = [*command_of_ours("lora-embed", setting, job), "--no-publish"]
        whole, whole_bytes = finish(command, setting, job), forwarder.received
        parts = sorted(Path(setting.place.tables, job.name, "staging").glob("*/*/*.parquet"))
        rests, rest_bytes = [], []
        for _ in range(repeats):
            parts[len(parts) // 2].unlink()
            before = forwarder.received
            rests.append(finish(command, setting, job))
            rest_bytes.append(forwarder.received - before)
    rest_s = statistics.median(rest.whole_s for rest in rests)
    return {
        "parts": len(parts),
        "input_bytes": sum(shard.stat().st_size for shard in shards),
        "whole": asdict(whole) | {"bytes_read": whole_bytes},
        "rest": [asdict(rest) | {"bytes_read": read} for rest, read in zip(rests, rest_bytes, strict=True)],
        "rest_over_whole": rest_s / whole.whole_s,
    }
