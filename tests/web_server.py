"""A web server for tests that answers each path as it is told, and remembers who asked for what."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, dict[str, str], bytes]
Answers = dict[str, bytes | Answer | Callable[[int], bytes | Answer]]  # a function is given how often the path was asked for


@dataclass
class WebServer:
    """Where it listens, and the headers of each request, by path."""

    port: int
    requests: defaultdict[str, list[dict[str, str]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def count(self) -> int:
        return sum(map(len, self.requests.values()))


@contextmanager
def web_server(answers: Answers) -> Iterator[WebServer]:
    """Answers until the block ends. Bytes stand for an answer with status 200; other paths have 404."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests[self.path].append(dict(self.headers.items()))
            answer = answers.get(self.path, (404, {}, b"no such page"))
            if callable(answer):
                answer = answer(len(server.requests[self.path]))
            status, headers, body = (200, {}, answer) if isinstance(answer, bytes) else answer
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            self.close_connection |= headers.get("Content-Length") == ""

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server = WebServer(listening.server_address[1])
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield server
        listening.shutdown()
