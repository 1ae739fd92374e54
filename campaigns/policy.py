"""Hold deploy/ against the rules of checkov, a policy tool: `make policy`. Exit code 1 where one does not hold.

KubeRay's own kind is unknown to it, so the pods that a RayJob leads to are shown to it as pods.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import yaml

from jobs import ROOT
from kuberay import pod_templates
from manifests import APPLIED, RAYJOB

PASSED_OVER = {  # rule → why it does not hold here
    "CKV_K8S_8": "KubeRay adds liveness probes to pods that have none",
    "CKV_K8S_9": "KubeRay adds readiness probes to pods that have none",
    "CKV_K8S_22": "Ray writes to its home and to /tmp",
    "CKV_K8S_35": "storage libraries read keys from the environment; a role needs none",
    "CKV_K8S_38": "the head's autoscaler and the night's kubectl need a token; workers and submitters have none",
    "CKV_K8S_40": "1000 is the user of Ray's image",
    "CKV_K8S_43": "the image is the reader's own: <registry>/…, by digest once it is pushed",
    "CKV_DOCKER_2": "pods are probed by KubeRay",
    "CKV_DOCKER_3": "Ray's image has a user of its own",
}


def main(checkov: str) -> int:
    """Render, check, and say what does not hold."""
    with tempfile.TemporaryDirectory() as scratch:
        pods = [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "lora-embed"}, "spec": template["spec"]}
            for name, template in pod_templates(RAYJOB)
        ]
        Path(scratch, "deploy.yaml").write_text(yaml.safe_dump_all([*APPLIED.values(), *pods]))
        Path(scratch, "Dockerfile").write_text((ROOT / "deploy" / "Dockerfile").read_text())
        kinds = ["kubernetes", "dockerfile", "secrets"]
        command = [checkov, "-d", scratch, "--compact", "--quiet", "--framework", *kinds, "--skip-check", ",".join(PASSED_OVER)]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
