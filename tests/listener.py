"""A listener on the loopback address that answers everybody with nothing, and remembers that they came."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Listener:
    """Where it listens, and the beginning of each request that arrived."""

    port: int
    requests: list[bytes] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def listening() -> Iterator[Listener]:
    """Accepts connections until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = Listener(server.getsockname()[1])

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                with connection:
                    connection.settimeout(0.5)
                    try:
                        listener.requests.append(connection.recv(400))
                        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    except OSError:
                        listener.requests.append(b"")

        threading.Thread(target=answer, daemon=True).start()
        yield listener
        server.shutdown(socket.SHUT_RDWR)
