"""The engine benchmark: its summary, and the error for an engine process that died."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from rudder.server.bench.engine import Side, groups, measure, pair_line, summary
from rudder.server.bench.load import Load, Run


def test_dead_side_is_reported_with_its_exit_code() -> None:
    side = Side("plain", Path(), Path(), Load())
    side.process = multiprocessing.get_context("spawn").Process(target=sys.exit, args=(3,))
    with pytest.raises(RuntimeError, match="the plain engine stopped with exit code 3"):
        side.__enter__()


def test_summary_has_the_median_ratio_of_all_pairs_and_of_each_start() -> None:
    pairs = [(Run(100.0, 10.0), Run(speed, 15.0)) for speed in (90.0, 94.0, 99.0, 101.0)]
    result = summary(pairs, Load(starts=2, pairs=2))
    assert (result["ratio"], result["ratio_of_each_start"]) == (0.965, [0.92, 1.0])
    assert (result["plain_tok_s"], result["first_token_added_ms"]) == (100.0, 5.0)


def test_cases_are_grouped_by_the_engines_that_they_compare() -> None:
    assert groups(["idle", "one_program", "grpc"]) == [
        (("plain", "rudder"), ["idle", "one_program"]),
        (("rudder", "grpc"), ["grpc"]),
    ]
    assert groups(["grpc"]) == [(("rudder", "grpc"), ["grpc"])]


def test_every_pair_is_a_line() -> None:
    class Instant:
        def measure(self, _: str) -> Run:
            return Run(100.0, 10.0)

    pairs = list(measure("idle", Load(pairs=2), {"plain": Instant(), "rudder": Instant()}))  # type: ignore[dict-item]
    assert [pair_line("idle", pair) for pair in pairs] == [
        "idle: plain 100 tok/s, rudder 100 tok/s, ratio 1.000 (warm-up, not counted)",
        *["idle: plain 100 tok/s, rudder 100 tok/s, ratio 1.000"] * 2,
    ]
