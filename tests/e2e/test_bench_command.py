"""The benchmarks of the engine and of the HTTP door run every kind of case and write their results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ["idle", "2_programs", "watch_64_features", "full_encode_1k"]


def test_small_benchmark_writes_its_result(tmp_path: Path) -> None:
    flags = {
        "shape": "tiny", "starts": 1, "pairs": 2, "requests": 4, "new_tokens": 8, "rows": 160, "latents": 1024,
        "programs": 2, "eager": "true", "cases": json.dumps(CASES), "json": tmp_path / "result.json",
    }  # fmt: skip
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "rudder.server", "bench", "engine", *arguments]
    stderr = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    assert "Exception ignored" not in stderr
    assert all(case in stderr for case in CASES)
    # Not a terminal: there is no bar, but a line for each pair and the warm-up.
    assert all(len(re.findall(rf"^{case}: .* ratio ", stderr, re.MULTILINE)) == 3 for case in CASES)
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert list(result["cases"]) == CASES
    for case in result["cases"].values():
        assert len(case["pairs"]) == 2
        assert len(case["ratio_of_each_start"]) == 1
        assert min(case["plain_tok_s"], case["tok_s"], case["ratio"]) > 0


@pytest.mark.long
def test_small_benchmark_of_the_http_door_writes_its_result(tmp_path: Path) -> None:
    flags = ["--streams", "2", "--tokens", "4", "--pairs", "2", "--json", str(tmp_path / "result.json")]
    command = [sys.executable, "-m", "rudder.server", "bench", "http", *flags]
    assert "2 streams of 4 tokens" in subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300
    ).stdout.replace("\n", " ")
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert len(result["vllm"]) == len(result["rudder"]) == 2
    assert min(result["first"], result["whole"]) > 0
