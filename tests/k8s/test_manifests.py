"""What k8s/ renders: valid for the oldest and the newest Kubernetes, and within the restricted Pod Security profile."""

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rudder.server import config
from tests.k8s.manifests import K8S, OVERLAYS, Object, fields_of, kustomize, objects, overlay, pods, rendered, server_of
from tests.k8s.schemas import VERSIONS, problems

CONTAINER = ("spec", "template", "spec", "containers", 0)
MISSPELT: dict[str, tuple[tuple[str | int, ...], str, str]] = {
    "Deployment": (CONTAINER, "readinessProbe", "readynessProbe"),
    "Service": (("spec", "ports", 0), "targetPort", "targetport"),
    "NetworkPolicy": (("spec",), "policyTypes", "policyType"),
    "PodDisruptionBudget": (("spec",), "maxUnavailable", "maxUnavailible"),
    "HorizontalPodAutoscaler": (
        ("spec", "behavior", "scaleDown"),
        "stabilizationWindowSeconds",
        "stabilisationSeconds",
    ),
    "ServiceMonitor": (("spec", "endpoints", 0), "scrapeTimeout", "scrape_timeout"),
    "ScaledObject": (("spec", "triggers", 0, "metadata"), "threshold", "treshold"),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_is_valid(name: str, version: str) -> None:
    assert [problem for item in overlay(name) for problem in problems(item, version)] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_base_is_valid_without_kustomize(version: str) -> None:
    """Runs everywhere: the base's files are whole objects."""
    files = [file for file in sorted((K8S / "base").glob("*.yaml")) if file.name not in NO_OBJECTS]
    items = [item for file in files for item in yaml.safe_load_all(file.read_text())]
    assert len(items) > 6
    assert [problem for item in items for problem in problems(item, version)] == []


NO_OBJECTS = ("kustomization.yaml", "config.yaml")


@pytest.mark.parametrize("kind", MISSPELT)
def test_misspelt_field_is_found(kind: str) -> None:
    item = next(item for name in OVERLAYS for item in objects(name, kind))
    path, right, wrong = MISSPELT[kind]
    for version in VERSIONS:
        broken = copy.deepcopy(item)
        parent: Any = broken
        for step in path:
            parent = parent[step]
        parent[wrong] = parent.pop(right)
        assert any(wrong in problem for problem in problems(broken, version))


def containers(name: str) -> Iterator[tuple[str, Object, Object]]:
    """Yield every container of an overlay, with its pod, and a name for messages."""
    for kind, pod in pods(name):
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            yield f"{kind}/{container['name']}", pod, container


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_meet_the_restricted_profile_on_a_read_only_root(name: str) -> None:
    for title, pod, container in containers(name):
        assert restricted(pod, container) == [], title


def restricted(pod: Object, container: Object) -> list[str]:
    """Return what in a container is not as Pod Security's restricted profile and O-2.2 ask."""
    own, of_pod = container.get("securityContext", {}), pod.get("securityContext", {})
    checks = {
        "runs as root": of_pod.get("runAsNonRoot") is True and of_pod.get("runAsUser", 0) > 0,
        "escalates privileges": own.get("allowPrivilegeEscalation") is False,
        "keeps capabilities": own.get("capabilities") == {"drop": ["ALL"]},
        "has no seccomp profile": of_pod.get("seccompProfile") == {"type": "RuntimeDefault"},
        "writes its root": own.get("readOnlyRootFilesystem") is True,
        "is privileged": not own.get("privileged"),
        "shares the node": not any(pod.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")),
        "has a token": pod.get("automountServiceAccountToken") is False,
        "has the variables of services": pod.get("enableServiceLinks") is False,
        "mounts the node": not any("hostPath" in volume for volume in pod["volumes"]),
        "has no memory limit": bool(memory := container["resources"]["limits"].get("memory")),
        "asks for other memory than its limit": container["resources"]["requests"]["memory"] == memory,
    }
    return [problem for problem, good in checks.items() if not good]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"runAsUser": 0}, "runs as root"),
        ({"seccompProfile": {"type": "Unconfined"}}, "has no seccomp profile"),
    ],
)
def test_a_pod_outside_the_profile_is_found(change: Object, problem: str) -> None:
    ((_, pod),) = pods("cpu-demo")
    broken = copy.deepcopy(pod)
    broken["securityContext"] |= change
    assert restricted(broken, server_of(broken)) == [problem]


@pytest.mark.parametrize("name", OVERLAYS)
def test_only_declared_volumes_are_written(name: str) -> None:
    """An image or a claim is read only; what is written is an emptyDir with a limit."""
    for title, pod, container in containers(name):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            assert mount.get("readOnly") or "sizeLimit" in volume.get("emptyDir", {}), (title, mount)


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_mount_is_a_sub_path(name: str) -> None:
    """Files of a subPath are never updated: no reload of certificates, tokens or policies."""
    for title, _, container in containers(name):
        assert not [mount for mount in container["volumeMounts"] if mount.keys() & {"subPath", "subPathExpr"}], title


@pytest.mark.parametrize("name", OVERLAYS)
def test_model_images_are_pinned_by_digest(name: str) -> None:
    for title, pod in pods(name):
        for volume in pod["volumes"]:
            if "image" in volume:
                assert re.search(r"@sha256:[0-9a-f]{64}$", volume["image"]["reference"]), title


@pytest.mark.parametrize("name", OVERLAYS)
def test_several_pods_have_a_disruption_budget_and_a_single_one_has_none(name: str) -> None:
    scaled = [item["spec"]["minReplicas"] for item in objects(name, "HorizontalPodAutoscaler")]
    scaled += [item["spec"]["minReplicaCount"] for item in objects(name, "ScaledObject")]
    (deployed,) = [item["spec"].get("replicas", 1) for item in objects(name, "Deployment")] or [1]
    assert len(scaled) <= 1
    assert not (scaled and "replicas" in objects(name, "Deployment")[0]["spec"]), "two owners of one number"
    budgets = objects(name, "PodDisruptionBudget")
    assert bool(budgets) == (max([deployed, *scaled]) > 1)
    assert all(budget["spec"]["maxUnavailable"] == 1 for budget in budgets)


def test_network_policies_deny_what_none_names() -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in objects("one-gpu", "NetworkPolicy")}
    assert policies["rudder-default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    allowed = {port["port"] for spec in policies.values() for rule in spec.get("ingress", ()) for port in rule["ports"]}
    # Health is for the kubelet alone, which comes from the node.
    assert allowed == {"grpc", "metrics"}
    assert all(rule["from"] for spec in policies.values() for rule in spec.get("ingress", ()))
    (to_dns,) = policies["rudder-dns"]["egress"]
    assert to_dns["to"][0]["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}


@pytest.mark.parametrize("component", sorted(folder.name for folder in (K8S / "components").iterdir()))
def test_every_component_can_be_added_to_the_base(component: str, tmp_path: Path) -> None:
    folders = {"resources": K8S / "base", "components": K8S / "components" / component}
    lines = [f"{field}: [{os.path.relpath(folder, tmp_path)}]" for field, folder in folders.items()]
    (tmp_path / "kustomization.yaml").write_text("\n".join(lines))
    plain = rendered(K8S / "base")
    items = rendered(tmp_path)
    assert items != plain
    assert [problem for item in items for problem in problems(item, VERSIONS[1])] == []
    (deployment,) = [item for item in items if item["kind"] == "Deployment"]
    _, fields = fields_of(server_of(deployment["spec"]["template"]["spec"]))
    config.load(None, fields)


def test_rendering_needs_a_kustomize_that_both_generations_understand() -> None:
    """No field that version 5 has deprecated, none that 4.5 does not know."""
    assert kustomize()
    for file in K8S.rglob("kustomization.yaml"):
        fields = yaml.safe_load(file.read_text()).keys() - {"apiVersion", "kind"}
        assert fields <= SHARED_FIELDS, file


SHARED_FIELDS = {
    "namespace", "resources", "components", "patches", "replacements", "configMapGenerator", "images", "labels",
    "replicas", "configurations", "generatorOptions",
}  # fmt: skip
