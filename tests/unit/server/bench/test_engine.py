"""The engine benchmark: its summary, and the error for an engine process that died."""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from rudder.server.bench.engine import Side, groups, measure, pair_line, save, summary
from rudder.server.bench.load import Load, Run, kv_cache_bytes


def test_dead_side_is_reported_with_its_exit_code() -> None:
    side = Side("plain", Path(), Path(), Load())
    side.process = multiprocessing.get_context("spawn").Process(target=sys.exit, args=(3,))
    with pytest.raises(RuntimeError, match="the plain engine stopped with exit code 3"):
        side.__enter__().receive()


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

    sides: Any = {"plain": Instant(), "rudder": Instant()}
    pairs = list(measure(["idle"], Load(pairs=2), sides))
    assert [pair_line(case, pair) for case, pair in pairs] == [
        "idle: plain 100 tok/s, rudder 100 tok/s, ratio 1.000 (warm-up, not counted)",
        *["idle: plain 100 tok/s, rudder 100 tok/s, ratio 1.000"] * 2,
    ]
    cases = ["idle", "one_program"]
    rounds = [(case, pair.warm_up) for case, pair in measure(cases, Load(pairs=2, warm_up="start"), sides)]
    assert rounds == [("idle", True), *[(case, False) for case in cases * 2]]


def test_result_has_every_pair_measured_so_far(tmp_path: Path) -> None:
    pairs: dict[str, list[tuple[Run, Run]]] = {
        "idle": [(Run(100.0, 10.0, 9.0), Run(90.0, 15.0, 10.0))],
        "one_program": [],
    }
    save(Load(pairs=2), pairs, tmp_path / "result.json")
    ((case, result),) = json.loads((tmp_path / "result.json").read_bytes())["cases"].items()
    assert (case, result["ratio"], result["plain_tpot_ms"], result["tpot_ms"]) == ("idle", 0.9, 9.0, 10.0)


def test_cache_has_room_for_all_requests() -> None:
    assert kv_cache_bytes(Load()) == 2 << 30
    # Keys and values of 8 heads of 128 in 32 layers, two bytes each.
    token_bytes = 2 * 8 * 128 * 32 * 2
    load = Load(shape="llama-8b", requests=256, prompt_tokens=256, new_tokens=256)
    assert kv_cache_bytes(load) == 256 * (512 + 32) * token_bytes
