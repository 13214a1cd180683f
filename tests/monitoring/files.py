"""Dashboards and rules as they are in k8s/components/monitoring, and the metrics that their queries name."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rudder.server.monitoring.series import TABLE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s" / "components" / "monitoring"
RULES = FOLDER / "rules" / "rudder.yaml"
RULE_TESTS = tuple(sorted(Path(__file__).parent.glob("rules*_test.yaml")))
DASHBOARDS = tuple(sorted((FOLDER / "dashboards").glob("*.json")))
# Metrics of vLLM and of the Prometheus client library, and recorded ones.
NAME = re.compile(r"\b(?:rudder[_:][a-z0-9_:]+|vllm:[a-z0-9_]+|process_[a-z_]+)\b")
SELECTOR = re.compile(r"\b(rudder_\w+)\{([^}]*)\}")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


@dataclass(frozen=True)
class Panel:
    """A panel: its queries, each with the format of its legend."""

    dashboard: str
    title: str
    kind: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    body: Mapping[str, Any]

    @property
    def metrics(self) -> set[str]:
        """Names of the metrics that it shows."""
        return {name for query, _ in self.queries for name in names_in(query)}


def names_in(query: str) -> set[str]:
    """Return the metrics that a query names."""
    return set(NAME.findall(query))


def selected_labels(query: str) -> Iterator[tuple[str, str]]:
    """Yield each metric of ours that a query selects from, with each label that it selects by."""
    for name, selector in SELECTOR.findall(query):
        for label in LABEL.findall(selector):
            yield name, label


@cache
def dashboard(path: Path) -> dict[str, Any]:
    """Read a dashboard."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@cache
def panels(path: Path) -> tuple[Panel, ...]:
    """Return the panels of a dashboard that have queries."""
    return tuple(
        Panel(
            path.stem,
            body["title"],
            body["type"],
            body["fieldConfig"]["defaults"]["unit"],
            tuple((target["expr"], target["legendFormat"]) for target in body["targets"]),
            body,
        )
        for body in dashboard(path)["panels"]
        if body["type"] != "row"
    )


def all_panels() -> list[Panel]:
    """Return the panels of all dashboards."""
    return [panel for path in DASHBOARDS for panel in panels(path)]


@cache
def rules() -> dict[str, Any]:
    """Read the rules."""
    document: dict[str, Any] = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return document


def all_rules() -> list[dict[str, Any]]:
    """Return the rules of all groups."""
    return [rule for group in rules()["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """Return the alerts by name."""
    return {rule["alert"]: rule for rule in all_rules() if "alert" in rule}


def recorded() -> set[str]:
    """Return the names of recorded metrics."""
    return {rule["record"] for rule in all_rules() if "record" in rule}


def exported() -> set[str]:
    """Return the names under which a server exports what the table declares."""
    return {name for each in TABLE for name in each.exported}


def expanded(query: str, interval: str = "15s", **variables: str) -> str:
    """Return a query with its variables replaced: by `.*` unless they are given."""
    query = query.replace("$__rate_interval", interval)
    return re.sub(r"\$(\w+)", lambda match: variables.get(match[1], ".*"), query)
