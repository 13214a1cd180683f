"""What the Prometheus operator and Grafana get is what rules/ and dashboards/ hold."""

import importlib.util
import json
from types import ModuleType

import pytest
import yaml

from tests.k8s.manifests import K8S, objects
from tests.k8s.schemas import VERSIONS, problems

FOLDER = K8S / "components" / "monitoring"


def generator() -> ModuleType:
    """Load generate.py, which is a script."""
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_written_files_are_up_to_date() -> None:
    for name, text in generator().files(FOLDER).items():
        assert (FOLDER / name).read_text() == text, "run python k8s/components/monitoring/generate.py"


def test_dashboards_are_those_of_the_folder() -> None:
    maps = [
        item for item in objects("one-gpu", "ConfigMap") if "grafana_dashboard" in item["metadata"].get("labels", ())
    ]
    found = {file: json.loads(text) for item in maps for file, text in item["data"].items()}
    assert found == {file.name: json.loads(file.read_text()) for file in (FOLDER / "dashboards").glob("*.json")}


def test_rules_are_those_of_the_folder() -> None:
    contents = [yaml.safe_load(file.read_text()) for file in (FOLDER / "rules").glob("*.yaml")]
    groups = [group for content in contents for group in content.get("groups", ())]
    assert groups == [group for item in objects("one-gpu", "PrometheusRule") for group in item["spec"]["groups"]]


@pytest.mark.parametrize("field", ["for", "expr", "alert"])
def test_misspelt_field_of_a_rule_is_found(field: str) -> None:
    rule = {"alert": "Down", "expr": "up == 0", "for": "5m", "labels": {"severity": "page"}}
    item = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "rudder"},
        "spec": {"groups": [{"name": "rudder", "rules": [rule]}]},
    }
    assert problems(item, VERSIONS[1]) == []
    rule[f"{field}s"] = rule.pop(field)
    assert any(f"{field}s" in problem for problem in problems(item, VERSIONS[1]))
