"""Two tensor-parallel ranks fill their banks alike without communicating, and answer as one rank does."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.engine import models

PROGRAM = """
import json, sys
import numpy as np
from rudder.server.engine.traced import code_digest
from rudder.server.program import wire
from rudder.server.program.layout import Layout

SITES = ("layers.0.mlp_out", "layers.1.resid_post")
PROMPT = [1, 5, 9, 20, 33, 47]

def request(seed):
    rng = np.random.default_rng(seed)
    def vector(): return rng.normal(size=64).astype("<f4").tobytes()
    rows = (wire.Row(encoder=vector(), decoder=vector(), threshold=-1e30),)
    sites = tuple(wire.Site(i, rows, (wire.Edit(0, scale=0.5, shift=1.0),)) for i in range(2))
    return wire.encode(wire.Request(len(PROMPT), 64, True, (sites,)))

def main(folder, ranks):
    from vllm import LLM, SamplingParams
    llm = LLM(model=folder, dtype="float32", worker_cls="rudder.server.engine.worker.cpu.Worker",
              skip_tokenizer_init=True,
              additional_config=Layout(SITES, rows=8, slots=4).additional_config(code_digest()), enforce_eager=True,
              max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=1 << 26, tensor_parallel_size=ranks)
    extras = [None, {wire.EXTRA_ARG: request(1)}, {wire.EXTRA_ARG: request(2)}]
    greedy = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(extra_args=e, **greedy) for e in extras]
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 3, params, use_tqdm=False)
    usage = llm.collective_rpc("rudder_usage")
    print("RESULT " + json.dumps([[list(o.outputs[0].token_ids) for o in outputs], usage]))

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
"""


def generate(script: Path, folder: Path, ranks: int) -> tuple[list[list[int]], list[dict[str, object]]]:
    """Greedy ids of a batch with two programs and without one, and the resources that each rank holds afterwards."""
    threads = {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(i) for i in range(ranks)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(folder), str(ranks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ids, usage = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    return ids, usage


def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    folder = models.write("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] % 2 == 0
    script = tmp_path / "run.py"
    script.write_text(PROGRAM)
    one, _ = generate(script, folder, 1)
    two, usage = generate(script, folder, 2)
    assert two == one
    assert len({tuple(ids) for ids in one}) == 3, "the programs must show"
    assert len(usage) == 2
    assert usage[0] == usage[1]
