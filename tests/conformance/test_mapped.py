"""A large file is memory-mapped: 65,536 latents of width 4,096 in bfloat16, one GiB, in sparsify's format."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
LATENTS, WIDTH = 65_536, 4_096
# As a share of the file.
EXTRA = 0.1
SECONDS = 1.0

# Runs in its own process, so that only its own allocations count.
MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from rudder.sae_models.formats.load import load

torch.set_num_threads(1)
stop, peak = threading.Event(), [0]

def allocated():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], allocated())

before = allocated()
threading.Thread(target=watch, daemon=True).start()
wall, processor = time.perf_counter(), time.process_time()
rows = load(Path(sys.argv[1])).sae.rows(torch.tensor([2_049])).rows
wall, processor = time.perf_counter() - wall, time.process_time() - processor
stop.set()
first = rows.encoder[0, 0].item()
print(json.dumps({"extra": max(peak[0], allocated()) - before, "wall": wall, "processor": processor, "first": first}))
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "layers.2"
    folder.mkdir()
    config = {"activation": "topk", "k": 64, "d_in": WIDTH, "num_latents": LATENTS}
    (folder / "cfg.json").write_text(json.dumps(config))
    rows = torch.randn(1_024, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows[1, 0] = 0.75
    matrix = rows.repeat(LATENTS // len(rows), 1)
    vectors = {"encoder.bias": torch.ones(LATENTS).bfloat16(), "b_dec": torch.ones(WIDTH).bfloat16()}
    save_file({"encoder.weight": matrix, "W_dec": matrix.clone(), **vectors}, folder / "sae.safetensors")
    yield folder
    (folder / "sae.safetensors").unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_a_gib_of_bfloat16_is_memory_mapped_and_fast(checkpoint: Path) -> None:
    run = [sys.executable, "-c", MEASURE, str(checkpoint)]
    measured = json.loads(subprocess.run(run, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    print(measured)
    assert measured["first"] == 0.75
    assert measured["extra"] < EXTRA * (checkpoint / "sae.safetensors").stat().st_size
    # Processor time, because the machine may be busy.
    assert measured["processor"] < SECONDS
