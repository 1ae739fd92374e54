"""What tests of deploy/kuberay have of Kubernetes: an API server for RayJobs alone, which a real kubectl talks to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

Json = dict[str, Any]
PLACE = "/apis/ray.io/v1/namespaces/default/rayjobs"
KIND = {"group": "ray.io", "version": "v1", "kind": "RayJob"}
VERSION = {"groupVersion": "ray.io/v1", "version": "v1"}
VERBS = {"GET": "get", "POST": "create"}
RESOURCE = {"name": "rayjobs", "singularName": "rayjob", "namespaced": True, "kind": "RayJob", "verbs": list(VERBS.values())}
STRICT = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}  # the server checks fields, not kubectl
PATCH = {"parameters": [STRICT], "x-kubernetes-group-version-kind": KIND, "responses": {}}
DISCOVERY: dict[str, Json] = {
    "/api": {"kind": "APIVersions", "versions": []},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": "ray.io", "versions": [VERSION], "preferredVersion": VERSION}],
    },
    "/apis/ray.io/v1": {"kind": "APIResourceList", "groupVersion": "ray.io/v1", "resources": [RESOURCE]},
    "/openapi/v3": {"paths": {"apis/ray.io/v1": {"serverRelativeURL": "/openapi/v3/apis/ray.io/v1"}}},
    "/openapi/v3/apis/ray.io/v1": {
        "openapi": "3.0.0",
        "info": {"title": "RayJobs", "version": "1"},
        "paths": {f"{PLACE}/{{name}}": {"patch": PATCH}},
    },
}


@dataclass(frozen=True)
class Cluster:
    """RayJobs by name, as they were created, with the status that `run` gave them."""

    run: Callable[[Json], Json]  # an operator's part: a RayJob to the status it ends with
    check: Callable[[Json], list[str]]  # what is wrong with a RayJob
    rules: list[Json]  # of the Role of whoever asks
    jobs: dict[str, Json] = field(default_factory=dict)
    running: list[threading.Thread] = field(default_factory=list)

    def wait(self) -> None:
        """Until all have ended."""
        for thread in self.running:
            thread.join()

    def answer(self, method: str, path: str, body: Json | None) -> tuple[int, Json]:
        """Status and body of a request."""
        if path in DISCOVERY:
            return 200, DISCOVERY[path]
        if not path.startswith(PLACE):
            return _status(404, "NotFound", path)
        if not any("rayjobs" in rule["resources"] and VERBS[method] in rule["verbs"] for rule in self.rules):
            return _status(403, "Forbidden", f"{VERBS[method]} rayjobs")
        if method == "POST":
            return self._create(body or {})
        name = path.removeprefix(PLACE).removeprefix("/")
        if name not in self.jobs:
            return _status(404, "NotFound", f'rayjobs.ray.io "{name}" not found')
        return 200, self.jobs[name]

    def _create(self, job: Json) -> tuple[int, Json]:
        name = job["metadata"]["name"]
        if problems := self.check(job):
            return _status(422, "Invalid", "; ".join(problems))
        if name in self.jobs:
            return _status(409, "AlreadyExists", name)
        job["metadata"] |= {"namespace": "default", "uid": f"uid-of-{name}"}
        self.jobs[name] = job
        self.running.append(threading.Thread(target=lambda: job.update(status=self.run(job))))
        self.running[-1].start()
        return 201, job


def _status(code: int, reason: str, message: str) -> tuple[int, Json]:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code}
    return code, body


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, cluster: Cluster, *arguments: Any) -> None:
        self.cluster = cluster
        super().__init__(*arguments)

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        code, answer = self.cluster.answer(self.command, urlsplit(self.path).path, body)
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def serve(cluster: Cluster, folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which kubectl finds this cluster."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, cluster))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    context = {"name": "test", "context": {"cluster": "test", "user": "test"}}
    clusters = [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}]
    config = {"kind": "Config", "apiVersion": "v1", "current-context": "test", "contexts": [context], "clusters": clusters}
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield {"KUBECONFIG": str(folder / "kubeconfig"), "KUBECACHEDIR": str(folder / "cache")}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
