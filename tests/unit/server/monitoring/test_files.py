"""Dashboards, rules and docs name what the server exports; Prometheus's own tools accept them."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from rudder.server.monitoring import metrics, series, table
from rudder.server.monitoring.exposition import exposed
from rudder.server.monitoring.families import Values
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.series import TABLE
from tests.monitoring import files
from tests.monitoring.files import DASHBOARDS, RULE_TESTS, RULES, Panel, all_panels, all_rules
from tests.monitoring.prometheus import binary
from tests.unit.server.monitoring.test_metrics import fill

DOCUMENT = files.ROOT / "docs" / "monitoring.md"
# Labels that Prometheus adds, or that a histogram has.
ADDED = {"job", "instance", "le"}
QUERIES = [
    *(pytest.param(q, id=f"{p.dashboard}: {p.title}") for p in all_panels() for q, _ in p.queries),
    *(pytest.param(rule["expr"], id=rule.get("alert") or rule["record"]) for rule in all_rules()),
]
promtool = pytest.mark.skipif(binary("promtool") is None, reason="no promtool: `make prometheus` installs it")


def unknown(query: str) -> set[str]:
    """Return what a query names of ours that is neither exported nor recorded, and wrong labels."""
    names = {name for name in files.names_in(query) if name.startswith("rudder")}
    labels = {name: {*each.label_names} for each in TABLE for name in each.exported}
    wrong = {f"{n}{{{label}}}" for n, label in files.selected_labels(query) if label not in labels[n] | ADDED}
    return names - files.exported() - files.recorded() | wrong


@pytest.mark.parametrize("query", QUERIES)
def test_query_names_what_the_server_exports(query: str) -> None:
    assert files.names_in(query)
    assert unknown(query) == set()


def test_what_is_not_exported_is_found() -> None:
    assert unknown("sum(rudder_requests{})") == {"rudder_requests"}
    assert unknown("rate(rudder:first_token:slow[5m])") == {"rudder:first_token:slow"}
    assert unknown('rudder_requests_total{outcomes="OK", job="x"}') == {"rudder_requests_total{outcomes}"}


def test_every_series_is_shown_or_watched_or_told_why_not() -> None:
    used = {name for parameter in QUERIES for name in files.names_in(str(parameter.values[0]))}
    unused = {each.name for each in TABLE if not used & set(each.exported)}
    # A retried call is counted for whoever searches for it; a failed self-test ends the start; what shadow policies
    # would refuse is looked for before one is enforced.
    assert unused == {"rudder_retried_requests", "rudder_selftest_failures", "rudder_policy_shadow_refusals"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_is_complete(path: Path) -> None:
    document = files.dashboard(path)
    panels = files.panels(path)
    assert (document["uid"], len({body["id"] for body in document["panels"]})) == (
        f"rudder-{path.stem}",
        len(document["panels"]),
    )
    assert [title for title, count in Counter(panel.title for panel in panels).items() if count > 1] == []
    variables = [variable["name"] for variable in document["templating"]["list"]]
    assert variables[:4] == ["datasource", "job", "model", "replica"]
    for panel in panels:
        assert panel.unit, panel.title
        assert panel.body["datasource"]["uid"] == "${datasource}"
        for query, _ in panel.queries:
            assert set(re.findall(r"\$(\w+)", query)) <= {*variables, "__rate_interval"}, panel.title
            # Whichever server or time range is chosen, a query follows it.
            assert "$job" in query, panel.title
            assert re.findall(r"\[(?!\$__rate_interval)", query) == [], panel.title
    overlaps = Counter(cell for body in document["panels"] for cell in cells(body["gridPos"]))
    assert max(overlaps.values()) == 1


def lost(path: str, ours: Any, theirs: Any) -> list[str]:
    """What Grafana's own model of a dashboard does not keep."""
    if isinstance(ours, dict):
        return [
            place
            for key, value in ours.items()
            for place in (lost(f"{path}.{key}", value, theirs[key]) if key in theirs else [f"{path}.{key}"])
        ]
    if isinstance(ours, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [place for i, pair in pairs for place in lost(f"{path}[{i}]", *pair)]
    return [] if ours == theirs else [path]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_survives_grafana_s_own_model(path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="`make lint` installs it")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def kept(document: dict[str, Any]) -> list[str]:
        theirs = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(document)))
        return lost("", document, theirs)

    register_default_plugins()
    document = json.loads(path.read_text())
    assert kept(document) == []
    document["panels"][0]["gridPosition"] = {}
    assert kept(document) == [".panels[0].gridPosition"]


def cells(place: dict[str, int]) -> list[tuple[int, int]]:
    """Cells of the grid that a panel covers."""
    assert place["x"] + place["w"] <= 24
    return [(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])]


@pytest.mark.parametrize("panel", [p for p in all_panels() if p.kind == "timeseries"], ids=lambda panel: panel.title)
def test_quantiles_are_of_sums_and_rates_of_an_interval(panel: Panel) -> None:
    for query, _ in panel.queries:
        if "histogram_quantile" in query:
            assert re.fullmatch(r"histogram_quantile\([\d.]+, sum by \(le[^)]*\) \(rate\(.*\)\)\)", query)
        # An average over all time answers no question.
        assert not re.search(r"_sum\{[^}]*\} /", query)


def test_objectives_are_bounds_of_buckets() -> None:
    bounds = {f"{bound:g}" for bound in metrics.LATENCY_BOUNDS}
    found = {le for rule in all_rules() for le in re.findall(r'\ble="([\d.]+)"', rule["expr"])}
    assert found == {"2.5"}
    assert found <= bounds


def test_every_alert_has_a_case_that_fires_and_one_that_is_silent() -> None:
    cases: dict[str, set[bool]] = {}
    for path in RULE_TESTS:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for case in test["alert_rule_test"]:
                cases.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert cases == {name: {True, False} for name in files.alerts()}


@pytest.mark.parametrize(("name", "alert"), files.alerts().items(), ids=list(files.alerts()))
def test_alert_says_what_to_do(name: str, alert: dict[str, Any]) -> None:
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert notes["runbook"] == f"docs/monitoring.md#{name.lower()}"
    assert f"\n### {name}\n" in DOCUMENT.read_text(encoding="utf-8")


def test_document_has_no_alert_that_is_gone() -> None:
    headings = re.findall(r"^### (Rudder\w+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(files.alerts())


def test_table_of_the_document_is_the_present_one() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert table.updated(text) == text, "make metrics-table"
    stale = text.replace("| `rudder_ready` |", "| `rudder_is_ready` |")
    assert table.updated(stale) == text != stale


def test_names_follow_the_conventions_of_prometheus() -> None:
    for each in TABLE:
        assert re.fullmatch(r"rudder(_[a-z]+)+", each.name), each.name
        assert each.kind != "counter" or not each.name.endswith("_total")
        assert each.help.endswith(".")
        assert each.kind != "histogram" or each.name.endswith("_seconds")
    assert len({each.name for each in TABLE}) == len(TABLE)
    assert all(label.bound for each in TABLE for label in each.labels)


@promtool
def test_promtool_accepts_the_names() -> None:
    registry = CollectorRegistry()
    fill(Metrics.create(registry))
    result = tool("check", "metrics", text=exposed(registry)[1])
    # The quantiles of benign scores are gauges: of the last choices, not of all since the start.
    assert set(result[1].splitlines()) == {
        'rudder_guard_benign_score non-summary metrics should not have "quantile" label'
    }
    registry.register(Values(series.Series("x", "rudder_ms", "counter", ""), 9, print))
    assert "rudder_ms" in tool("check", "metrics", text=exposed(registry)[1])[1]


@promtool
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_promtool_fires_each_alert_and_keeps_it_silent(path: Path) -> None:
    status, output = tool("test", "rules", str(path))
    assert status == 0, output


@promtool
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    assert tool("check", "rules", str(RULES))[0] == 0
    wrong = tmp_path / "rules.yaml"
    wrong.write_text(RULES.read_text().replace("sum by (job)", "sum by job", 1))
    assert tool("check", "rules", str(wrong))[0] != 0


@promtool
def test_promtool_accepts_the_configuration_of_the_document(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "prometheus.yml").write_text(text)
    assert tool("check", "config", str(tmp_path / "prometheus.yml"))[0] != 0
    (tmp_path / "rules").symlink_to(RULES.parent)
    assert tool("check", "config", str(tmp_path / "prometheus.yml")) == (0, "")


def tool(*arguments: str, text: bytes = b"") -> tuple[int, str]:
    """Run promtool; return its status and what it says on stderr."""
    command = binary("promtool")
    assert command
    result = subprocess.run([command, *arguments], input=text, capture_output=True, check=False)
    return result.returncode, result.stderr.decode() + (result.stdout.decode() if result.returncode else "")
