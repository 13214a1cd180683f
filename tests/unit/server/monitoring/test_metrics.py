"""What is counted here and not by the metrics library says the same as the library would."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from rudder.server.monitoring import metrics


def series(text: bytes) -> list[str]:
    """The lines that carry values, without when the series began."""
    return [line for line in text.decode().splitlines() if not line.startswith("#") and "_created" not in line]


def test_many_at_once_is_one_after_the_other() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bounds = (0.0005, 0.25, 1, 60)
    many = metrics.ManyAtOnce("gap_seconds", "Time between.", bounds, ours)
    single = Histogram("gap_seconds", "Time between.", buckets=bounds, registry=theirs)
    assert series(generate_latest(ours)) == series(generate_latest(theirs))
    for value, times in ((0.0005, 3), (0.25, 1), (0.26, 4), (0.0, 2), (61.0, 5), (2.0, 0)):
        many.observe(value, times)
        for _ in range(times):
            single.observe(value)
    assert sorted(series(generate_latest(ours))) == sorted(series(generate_latest(theirs)))
