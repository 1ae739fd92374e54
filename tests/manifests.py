"""The manifests of deploy/ as kubectl reads them, without a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from jobs import ROOT
from kuberay import pod_templates

Json = dict[str, Any]
DEPLOY = ROOT / "deploy"
FOLDER = DEPLOY / "kuberay"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def kubectl(*arguments: str, **variables: str) -> str:
    command = ["kubectl", *arguments]
    return subprocess.run(
        command, env=os.environ | {"PATH": PATH} | variables, check=True, capture_output=True, text=True
    ).stdout


def read_rayjob() -> Json:
    """As kubectl reads it, anchors and all."""
    return dict(
        json.loads(kubectl("patch", "--local", "-f", str(FOLDER / "rayjob.yaml"), "-p", "{}", "--type=merge", "-ojson"))
    )


def read_applied(folder: Path = FOLDER) -> dict[tuple[str, str], Json]:
    """What `kubectl apply -k` sends, by kind and name."""
    manifests = yaml.safe_load_all(kubectl("kustomize", str(folder)))
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


def nightly_pod(applied: dict[tuple[str, str], Json]) -> Json:
    return dict(applied["CronJob", "lora-embed-nightly"]["spec"]["jobTemplate"]["spec"]["template"]["spec"])


RAYJOB, APPLIED = read_rayjob(), read_applied()
PODS = {name: template["spec"] for name, template in pod_templates(RAYJOB)} | {"nightly": nightly_pod(APPLIED)}
