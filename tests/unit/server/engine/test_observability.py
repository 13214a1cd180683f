"""vLLM's own histograms have the buckets of the server's, and its spans go to the same collector."""

from typing import Any

import pytest

from rudder.server import config as configuration
from rudder.server.config import ConfigError, Monitoring
from rudder.server.engine import adapter
from rudder.server.monitoring.metrics import LATENCY_BOUNDS, TOKEN_BOUNDS
from rudder.server.preflight import check_monitoring
from rudder.server.serve import metrics_of


def test_vllm_has_the_bounds_and_the_collector_of_the_server() -> None:
    arguments = adapter.observability(Monitoring(traces_endpoint="http://collector:4317", token_bounds_s=(0.5, 1.0)))
    buckets = arguments["custom_histogram_buckets"]
    assert buckets["time_to_first_token"] == buckets["request_latency"] == list(LATENCY_BOUNDS)
    assert buckets["inter_token_latency"] == [0.5, 1.0]
    assert arguments["otlp_traces_endpoint"] == "http://collector:4317"
    default = adapter.observability(Monitoring())
    assert (default["otlp_traces_endpoint"], default["custom_histogram_buckets"]["inter_token_latency"]) == (
        None,
        list(TOKEN_BOUNDS),
    )


def test_series_of_the_process_follow_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr("rudder.server.serve.Metrics.create", lambda _, **settings: made.update(settings))
    metrics_of(Monitoring(max_series=500, latency_bounds_s=(1.0, 2.5)))
    assert made == {"max_series": 500, "latency_bounds": (1.0, 2.5), "token_bounds": TOKEN_BOUNDS}


@pytest.mark.parametrize("bounds", ["[2, 1]", "[1, 1]"])
def test_bounds_that_do_not_increase_are_refused_by_name(bounds: str) -> None:
    config = configuration.load(None, {"monitoring.token_bounds_s": bounds})
    with pytest.raises(ConfigError, match=r"monitoring\.token_bounds_s: each bound"):
        check_monitoring(config.monitoring)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("monitoring.max_series", "99"),
        ("monitoring.latency_bounds_s", "[0]"),
        ("monitoring.traces_endpoint", "localhost:4317"),
        ("monitoring.traces_share", "0"),
        ("watch", f"[{', '.join(f'{{index: {i}}}' for i in range(257))}]"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        configuration.load(None, {field: value})
