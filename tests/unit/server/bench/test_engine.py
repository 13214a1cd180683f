"""The engine benchmark: its summary, and the error for an engine process that died."""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from rudder.server.bench.engine import Side, groups, measure, pair_line, save, summary
from rudder.server.bench.load import Load, Run, Subject, kv_cache_bytes, shipped_subject


def subject(kv_token_bytes: int = 1, random: bool = True) -> Subject:
    return Subject(Path(), Path(), (Path(),), ("layers.1.resid_post",), 8, kv_token_bytes, random)


def test_dead_side_is_reported_with_its_exit_code() -> None:
    side = Side("plain", subject(), Load())
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
    policy = "policy_with_guards"
    assert groups(["idle", policy]) == [(("plain", "rudder"), ["idle"]), (("plain", policy), [policy])]


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
    assert kv_cache_bytes(Load(), subject()) == 2 << 30
    assert kv_cache_bytes(Load(), subject(random=False)) == 1 << 29
    load = Load(requests=256, prompt_tokens=256, new_tokens=256)
    assert kv_cache_bytes(load, subject(1 << 16)) == 256 * (512 + 32) << 16


def test_model_with_bundles_is_described_by_its_files(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64, "hidden_size": 576}
    bundles = tuple(tmp_path / name for name in ("a", "b"))
    for number, folder in enumerate((tmp_path / "model", *bundles)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "manifest.json").write_text(json.dumps({"sites": [f"layers.{number}.resid_post"]}))
    described = shipped_subject(tmp_path, tmp_path / "model", bundles)
    assert described.sites == described.sae_sites == ("layers.1.resid_post", "layers.2.resid_post")
    # Keys and values of three heads of 64 in 30 layers, four bytes each.
    assert (described.width, described.kv_token_bytes, described.random) == (576, 2 * 3 * 64 * 30 * 4, False)


def test_only_a_random_dictionary_has_its_size_in_the_name_of_the_case() -> None:
    assert "full_encode_16k" in Load().all_cases()
    assert "full_encode" in Load(model="smollm2-135m-instruct").all_cases()
