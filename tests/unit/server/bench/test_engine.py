"""The engine benchmark's arithmetic, and what it says of an engine that dies."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from rudder.server.bench.engine import Load, Run, Side, groups, summary


def test_a_side_that_dies_is_named_with_its_exit_code() -> None:
    side = Side("plain", Path(), Path(), Load())
    side.process = multiprocessing.get_context("spawn").Process(target=sys.exit, args=(3,))
    with pytest.raises(RuntimeError, match="the plain engine stopped with exit code 3"):
        side.__enter__()


def test_the_ratio_is_the_median_of_the_pairs_and_each_start_tells_its_own() -> None:
    pairs = [(Run(100.0, 10.0), Run(speed, 15.0)) for speed in (90.0, 94.0, 99.0, 101.0)]
    found = summary(pairs, Load(starts=2, pairs=2))
    assert (found["ratio"], found["ratio_of_each_start"]) == (0.965, [0.92, 1.0])
    assert (found["plain_tok_s"], found["first_token_added_ms"]) == (100.0, 5.0)


def test_only_the_two_engines_that_a_case_compares_run_beside_each_other() -> None:
    assert groups(["idle", "one_program", "grpc"]) == [
        (("plain", "rudder"), ["idle", "one_program"]),
        (("rudder", "grpc"), ["grpc"]),
    ]
    assert groups(["grpc"]) == [(("rudder", "grpc"), ["grpc"])]
