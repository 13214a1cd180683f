"""What manifests say of the server is what it does: flags, fields, ports, probes, metrics, times, labels, files."""

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from rudder.server import __version__, serve
from rudder.server.config import Config
from rudder.server.grpc.health import LIVENESS, READINESS
from rudder.server.preflight import check_audit, check_door
from rudder.server.process import require_distinct
from tests.k8s.manifests import (
    K8S,
    OVERLAYS,
    REPOSITORY,
    Object,
    objects,
    overlay,
    pods,
    server_config,
    server_of,
)

# Between the end of the drain and the exit: the engine shuts down.
EXIT_S = 10


@pytest.fixture(params=OVERLAYS)
def name(request: pytest.FixtureRequest) -> str:
    overlay_name: str = request.param
    return overlay_name


def test_flags_and_fields_are_those_of_the_server(name: str, tmp_path: Path) -> None:
    for _, pod in pods(name):
        config = server_config(name, pod, tmp_path)
        assert config.listen.host == "0.0.0.0"
        assert config.logs.format == "json"


def test_a_field_that_the_server_does_not_have_is_found(tmp_path: Path) -> None:
    ((_, pod),) = pods("cpu-demo")
    broken = {**pod, "containers": [{**server_of(pod), "args": [*server_of(pod)["args"], "--listen.prot=1"]}]}
    with pytest.raises(ValueError, match=r"listen\.prot"):
        server_config("cpu-demo", broken, tmp_path)


def test_the_server_accepts_the_door_that_pods_open(name: str, tmp_path: Path) -> None:
    """With the files of Secrets in their places: TLS and tokens, or plaintext that was asked for."""
    for _, pod in pods(name):
        config = with_secrets(server_config(name, pod, tmp_path), pod, tmp_path)
        check_door(config)
        check_audit(config.audit)
        assert config.listen.health_port is not None
        require_distinct(config.listen)


def with_secrets(config: Config, pod: Object, folder: Path) -> Config:
    """Return the configuration with the files below mounts of Secrets written into `folder`."""
    mounts = {mount["name"]: mount["mountPath"] for mount in server_of(pod)["volumeMounts"]}
    secrets = [mounts[volume["name"]] for volume in pod["volumes"] if "secret" in volume and volume["name"] in mounts]
    tls = {}
    for field in ("certificate", "key"):
        if path := getattr(config.tls, field):
            assert any(path.startswith(f"{mount}/tls.") for mount in secrets), path
            file = folder / Path(path).name
            file.touch()
            tls[field] = str(file)
    identity = config.identity
    if identity.tokens:
        assert any(identity.tokens.startswith(f"{mount}/") for mount in secrets)
        (folder / "tokens.yaml").write_text("tokens: []\n")
        identity = msgspec.structs.replace(identity, tokens=str(folder / "tokens.yaml"))
    return msgspec.structs.replace(config, tls=msgspec.structs.replace(config.tls, **tls), identity=identity)


def test_ports_are_those_of_the_configuration(name: str, tmp_path: Path) -> None:
    for _, pod in pods(name):
        config = server_config(name, pod, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in server_of(pod)["ports"]}
        listen = config.listen
        expected = {"grpc": listen.port, "health": listen.health_port, "metrics": listen.metrics_port}
        assert expected.items() >= ports.items()
        assert "health" in ports
        for item in objects(name, "Service"):
            for port in item["spec"]["ports"]:
                assert port["port"] == ports[port["targetPort"]] == expected[port["name"]]


def test_probes_ask_the_health_port_what_it_answers(name: str, tmp_path: Path) -> None:
    for title, pod in pods(name):
        listen, container = server_config(name, pod, tmp_path).listen, server_of(pod)
        names = {}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                assert container[probe]["grpc"]["port"] == listen.health_port
                names[probe] = container[probe]["grpc"]["service"]
        expected = {"startupProbe": READINESS, "readinessProbe": READINESS, "livenessProbe": LIVENESS}
        if title == "workerTemplate":
            expected = {"startupProbe": LIVENESS, "livenessProbe": LIVENESS}
        assert names == expected


def test_probe_budgets(name: str) -> None:
    """A large model has half an hour to load; a busy server a minute to answer; a draining one is left in seconds."""
    for _, pod in pods(name):
        container = server_of(pod)
        budget = {
            probe: container[probe]["periodSeconds"] * container[probe]["failureThreshold"]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
            if probe in container
        }
        assert budget["startupProbe"] >= 1800
        assert budget["livenessProbe"] >= 60
        assert budget.get("readinessProbe", 0) <= 5
        for item in objects(name, "Deployment"):
            assert item["spec"]["progressDeadlineSeconds"] > budget["startupProbe"]


def test_a_pod_has_the_time_that_a_drain_takes(name: str, tmp_path: Path) -> None:
    for title, pod in pods(name):
        listen = server_config(name, pod, tmp_path).listen
        hook = server_of(pod).get("lifecycle", {}).get("preStop", {})
        before = hook.get("sleep", {}).get("seconds", 0)
        needed = before + listen.accept_s + listen.drain_s + serve.FAILED_ANSWERS_S + EXIT_S
        assert pod["terminationGracePeriodSeconds"] >= needed, title


def test_load_balancers_notice_before_calls_are_refused(name: str, tmp_path: Path) -> None:
    for title, pod in pods(name):
        probe = server_of(pod).get("readinessProbe")
        if probe:
            noticed = probe["periodSeconds"] * probe["failureThreshold"]
            assert server_config(name, pod, tmp_path).listen.accept_s >= noticed, title


def test_images_are_this_version_of_a_stack_of_requirements(name: str) -> None:
    for title, pod in pods(name):
        images = {container["image"] for container in (*pod.get("initContainers", ()), *pod["containers"])}
        (image,) = images
        found = re.fullmatch(rf"rudder:{re.escape(__version__)}-(\w+)", image)
        assert found, (title, image)
        assert (REPOSITORY / "requirements" / f"{found[1]}.txt").is_file()
        assert ("nvidia.com/gpu" in server_of(pod)["resources"]["limits"]) == (found[1] == "cuda")


def test_references_have_their_objects(name: str) -> None:
    named = {(item["kind"], item["metadata"]["name"]) for item in overlay(name)}
    for _, pod in pods(name):
        wanted = {("ConfigMap", volume["configMap"]["name"]) for volume in pod["volumes"] if "configMap" in volume}
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            wanted |= {("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", ())}
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod["volumes"]}
        assert wanted | {("ServiceAccount", pod["serviceAccountName"])} <= named
    for item in (*objects(name, "HorizontalPodAutoscaler"), *objects(name, "ScaledObject")):
        target = item["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in named


def test_selectors_find_the_pods_and_services(name: str) -> None:
    templates = [item["spec"]["template"]["metadata"]["labels"] for item in objects(name, "Deployment")]
    for template in templates:
        for item in (*objects(name, "Service"), *objects(name, "PodDisruptionBudget")):
            selector = item["spec"]["selector"]
            assert selector.get("matchLabels", selector).items() <= template.items(), item["metadata"]["name"]
    services = [item["metadata"]["labels"].items() for item in objects(name, "Service")]
    for monitor in objects(name, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        assert len([labels for labels in services if wanted <= labels]) == 1


def test_policies_are_updated_in_place_and_read_again(tmp_path: Path) -> None:
    """A name with a hash would roll out all pods for a policy."""
    for name in ("one-gpu", "tensor-parallel"):
        assert "rudder-policies" in {item["metadata"]["name"] for item in objects(name, "ConfigMap")}
        ((_, pod),) = pods(name)
        policies = server_config(name, pod, tmp_path).policies
        assert policies.folder in {mount["mountPath"] for mount in server_of(pod)["volumeMounts"]}
        assert policies.reload_s > 0


def test_followers_of_a_model_source_serve_its_folders(tmp_path: Path) -> None:
    for name in ("one-gpu", "tensor-parallel"):
        ((_, pod),) = pods(name)
        engine = server_config(name, pod, tmp_path).engine
        assert (engine.model, engine.bundles) == ("/models/model", ("/models/bundle",))
        assert any(mount["mountPath"] == "/models" for mount in server_of(pod)["volumeMounts"])


def verify_script() -> str:
    """Return the script of the init container that compares the models with their list."""
    ((_, pod),) = pods("tensor-parallel")
    (container,) = [item for item in pod["initContainers"] if item["name"] == "verify-models"]
    assert container["command"] == ["/bin/sh", "-euc"]
    script: str = container["args"][0]
    return script


@pytest.mark.parametrize("change", ["", "altered", "missing", "added"])
def test_models_that_are_not_those_of_the_list_end_the_start(change: str, tmp_path: Path) -> None:
    files = {"model/config.json": b"{}", "model/model.safetensors": b"weights", "bundle/manifest.json": b"{1}"}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in files.items())
    (tmp_path / "SHA256SUMS").write_text(sums)
    weights = tmp_path / "model" / "model.safetensors"
    if change == "altered":
        weights.write_bytes(b"Weights")
    elif change == "missing":
        weights.unlink()
    elif change == "added":
        (tmp_path / "model" / "model-2.safetensors").write_bytes(b"more")
    script = verify_script().replace("/etc/rudder-models", str(tmp_path)).replace("/models", str(tmp_path))
    run = subprocess.run(["/bin/sh", "-euc", script], capture_output=True, text=True, check=False)
    assert (run.returncode == 0) == (change == ""), run.stderr


def metric_names(expression: str) -> set[str]:
    """Return the names of Rudder's metrics in a query."""
    return set(re.findall(r"\brudder_\w+", expression))


def test_autoscalers_ask_for_one_gauge() -> None:
    names: set[str] = set()
    for name in OVERLAYS:
        for item in objects(name, "HorizontalPodAutoscaler"):
            names |= {metric["pods"]["metric"]["name"] for metric in item["spec"]["metrics"]}
        for item in objects(name, "ScaledObject"):
            names |= {found for t in item["spec"]["triggers"] for found in metric_names(t["metadata"]["query"])}
    assert names == {"rudder_saturation"}


def test_scaling_down_is_slow(name: str) -> None:
    """A pod takes minutes to load its model: one that is gone is not back at once."""
    for behaviour in behaviours(name):
        assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 300


def behaviours(name: str) -> list[Any]:
    """Return how autoscalers of an overlay behave."""
    found = [item["spec"]["behavior"] for item in objects(name, "HorizontalPodAutoscaler")]
    configs = [item["spec"]["advanced"]["horizontalPodAutoscalerConfig"] for item in objects(name, "ScaledObject")]
    return found + [config["behavior"] for config in configs]


def test_manifests_name_no_tag_that_moves() -> None:
    for file in K8S.rglob("*.yaml"):
        for document in yaml.safe_load_all(file.read_text()):
            assert ":latest" not in str(document), file
