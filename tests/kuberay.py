"""What is wrong with a RayJob: by KubeRay's schema as stated here or read from its CRD, and by Kubernetes' for its pods."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Json = dict[str, Any]
KUBERAY, KUBERNETES = "1.7.0", "1.37.0"
# A file with the CRD of RayJobs, of KubeRay's repository or from `kubectl get crd rayjobs.ray.io -o yaml`, to check by as well.
CRD = os.environ.get("KUBERAY_CRD")

# The fields that the manifest uses, as KubeRay 1.7.0 declares them; 1.5.1 is the first that has them all. A field that is
# not here may be right too: look it up in the CRD and add it.
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object"}  # checked by Kubernetes' own schema
AUTH = {"mode": {"enum": ["token", "disabled"]}, "secretName": TEXT}
AUTOSCALER = {"idleTimeoutSeconds": COUNT, "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]}}
AUTOSCALER |= {"securityContext": POD}
HEAD = {"rayStartParams": TEXTS, "template": POD}
WORKERS = {"groupName": TEXT, "minReplicas": COUNT, "maxReplicas": COUNT, "replicas": COUNT} | HEAD


def _section(fields: Json, *required: str) -> Json:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


CLUSTER = {
    "rayVersion": TEXT,
    "authOptions": _section(AUTH),
    "enableInTreeAutoscaling": FLAG,
    "autoscalerOptions": _section(AUTOSCALER),
    "headGroupSpec": _section(HEAD, "template"),
    "workerGroupSpecs": {
        "type": "array",
        "items": _section(WORKERS, "groupName", "minReplicas", "maxReplicas", "template"),
    },
}
JOB = {
    "entrypoint": TEXT,
    "backoffLimit": COUNT,
    "activeDeadlineSeconds": COUNT,
    "shutdownAfterJobFinishes": FLAG,
    "ttlSecondsAfterFinished": COUNT,
    "rayClusterSpec": _section(CLUSTER, "headGroupSpec"),
    "submitterPodTemplate": POD,
}
STATED = _section(
    {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": "RayJob"}, "metadata": {"type": "object"}, "spec": _section(JOB)},
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def published(crd: Path) -> Json:
    """The schema of a CRD's version v1, refusing what Kubernetes would drop without a word."""
    versions = yaml.load(crd.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    [schema] = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    return dict(_strict(schema))


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        found = {"type": ["integer", "string"]}
    keeps_all = schema.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not keeps_all:
        found.setdefault("additionalProperties", False)
    return found


def pod_templates(job: Json) -> Iterator[tuple[str, Json]]:
    """Name → pod template of each kind of pod that a RayJob leads to."""
    cluster = job["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    yield "submitter", job["spec"]["submitterPodTemplate"]


def problems(job: Json) -> list[str]:
    """A sentence for each thing that is wrong."""
    schemas = [STATED] + ([published(Path(CRD))] if CRD else [])
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for schema in schemas
        for error in jsonschema.Draft202012Validator(schema).iter_errors(job)
    ]
    if not found:
        for name, template in pod_templates(job):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
            found += [f"{name}: {problem}" for problem in kubernetes_problems(pod)]
    return found


def kubernetes_problems(manifest: Json) -> list[str]:
    """The same for what Kubernetes itself knows."""
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}"]
    return []
