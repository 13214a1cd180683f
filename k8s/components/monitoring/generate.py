"""Wrap rules/ and dashboards/ for Kubernetes: `python k8s/components/monitoring/generate.py`.

The files there are Prometheus' and Grafana's own, as their tools read them. Written are prometheusrules.yaml, in which
the operator wants the rules, and kustomization.yaml, which makes a ConfigMap of each dashboard. A test compares them.
"""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
HEADER = "# Written by generate.py from rules/ and dashboards/.\n"
ABOUT = "# For the Prometheus operator, and Grafana's sidecar, which looks for the label grafana_dashboard.\n"


def main() -> None:
    for name, text in files(FOLDER).items():
        (FOLDER / name).write_text(text)


def files(folder: Path) -> dict[str, str]:
    """Return the text of each file that is written."""
    wrapped = rules(folder)
    resources = ["servicemonitor.yaml", *(["prometheusrules.yaml"] if wrapped else [])]
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": resources,
        "configMapGenerator": [dashboard(file) for file in sorted((folder / "dashboards").glob("*.json"))],
    }
    written = {"kustomization.yaml": HEADER + ABOUT + yaml.safe_dump(kustomization, sort_keys=False, width=140)}
    if wrapped:
        written["prometheusrules.yaml"] = HEADER + yaml.safe_dump_all(wrapped, sort_keys=False, width=140)
    return written


def rules(folder: Path) -> list[dict[str, Any]]:
    """Return a PrometheusRule for each file of rules. Files of promtool's tests have no groups."""
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((folder / "rules").glob("*.yaml"))}
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": f"rudder-{name}".removesuffix("-rudder")},
            "spec": {"groups": content["groups"]},
        }
        for name, content in contents.items()
        if "groups" in content
    ]


def dashboard(file: Path) -> dict[str, Any]:
    """Return the generator of a dashboard's ConfigMap. Its name has no hash: Grafana reads a changed one in place."""
    options = {"labels": {"grafana_dashboard": "1"}, "disableNameSuffixHash": True}
    return {"name": f"rudder-dashboard-{file.stem}", "files": [f"dashboards/{file.name}"], "options": options}


if __name__ == "__main__":
    main()
