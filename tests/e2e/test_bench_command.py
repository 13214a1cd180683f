"""`rudder bench engine` runs every kind of case and writes its result."""

import json
import re
import subprocess
import sys
from pathlib import Path

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
