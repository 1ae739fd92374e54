"""What pods, nodes and images may do, by deploy/ and cluster.yaml: no more than they need."""

import re
from importlib.metadata import version
from typing import Any

import pytest
import yaml

from jobs import ROOT
from manifests import APPLIED, DOCKERFILE, PODS
from test_licences import installed

CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HASHES = (ROOT / "deploy" / "hashes.txt").read_text().splitlines()
POLICIES = {name: found["spec"] for (kind, name), found in APPLIED.items() if kind == "NetworkPolicy"}
RAY = {"matchLabels": {"ray.io/is-ray-node": "yes"}}


def token_is_mounted(pod: dict[str, Any]) -> bool:
    account = APPLIED.get(("ServiceAccount", pod.get("serviceAccountName", "")), {})
    return bool(pod.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True)))


def test_only_who_asks_kubernetes_has_a_token() -> None:
    assert {name for name, pod in PODS.items() if token_is_mounted(pod)} == {"head", "nightly"}


def test_workers_do_not_share_the_account_that_kuberay_lets_change_clusters() -> None:
    """The operator binds its role to the head's account: patch of rayclusters, delete of pods."""
    head = PODS["head"]["serviceAccountName"]
    assert all(pod.get("serviceAccountName") != head for name, pod in PODS.items() if name != "head")
    bound = {subject["name"] for (kind, _), found in APPLIED.items() if kind == "RoleBinding" for subject in found["subjects"]}
    assert bound == {PODS["nightly"]["serviceAccountName"]}


def test_nothing_comes_in_but_from_the_cluster_its_submitter_and_its_operator() -> None:
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in POLICIES.values()
    [ray] = [policy for policy in POLICIES.values() if policy.get("ingress")]
    assert ray["podSelector"] == RAY
    among, others = ray["ingress"]
    assert among == {"from": [{"podSelector": RAY}]}
    assert others["ports"] == [{"port": 8265}]
    assert all("podSelector" in peer for peer in others["from"])


def test_workers_cannot_ask_a_node_for_its_keys() -> None:
    [egress] = [policy for policy in POLICIES.values() if policy.get("egress")]
    assert egress["podSelector"] == {"matchLabels": {"ray.io/node-type": "worker"}}
    blocks = [to["ipBlock"] for rule in egress["egress"] for to in rule["to"] if "ipBlock" in to]
    assert {address for block in blocks for address in block["except"]} == {"169.254.169.254/32", "fd00:ec2::254/128"}


@pytest.mark.parametrize("name", CLUSTER["available_node_types"])
def test_nodes_on_aws_have_a_group_of_yours_and_give_their_keys_to_nobody_else(name: str) -> None:
    node = CLUSTER["available_node_types"][name]["node_config"]
    assert node["MetadataOptions"] == {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    assert node["SecurityGroupIds"] == ["<sg-…>"]  # where a node has one, Ray adds no rule for port 22


def test_what_is_built_on_is_named_by_digest() -> None:
    images = [CLUSTER["docker"]["image"], *re.findall(r"^FROM (\S+)|--from=(\S+)", DOCKERFILE, re.M)[0][:1]]
    images += [found for pair in re.findall(r"^FROM (\S+)|--from=(\S+)", DOCKERFILE, re.M) for found in pair if found]
    assert images
    assert all(re.search(r"@(sha256:[0-9a-f]{64}|<sha256:…>)$", image) for image in images)


def test_the_image_installs_archives_of_known_hashes_alone() -> None:
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert "--require-hashes --only-binary :all: -r hashes.txt" in installs[0]
    assert "PIP_NO_INDEX=1 PIP_NO_DEPS=1" in installs[1]


def test_hashes_are_those_of_the_constraints_and_none_is_missing() -> None:
    lines = [re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64}|<…>)", line) for line in HASHES if line[0] != "#"]
    assert all(lines)
    hashed = {re.sub(r"[-_.]+", "-", line[1]).lower(): (line[2], line[3]) for line in lines if line is not None}
    pinned = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    constraints = {re.sub(r"[-_.]+", "-", name).lower(): number for name, number in pinned}
    needed = installed().keys() - {"lora-embed"}
    assert needed <= hashed.keys()
    assert {name: hashed[name][0] for name in hashed if name in constraints} == {
        name: constraints[name] for name in hashed if name in constraints
    }
    assert hashed.keys() - constraints.keys() <= {"setuptools"}
    assert {name for name, (_, digest) in hashed.items() if digest == "<…>"} == {"torch"}  # another one for each device
    assert hashed["ray"][0] == version("ray")
