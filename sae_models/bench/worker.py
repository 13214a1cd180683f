"""A trainer of one library in its own process, controlled by commands on standard input, one JSON object per line.

{"mode": m, "task": {...}}: create a new SAE; answers {}.
{"steps": n}: take n steps; answers {"wall": [s, ...], "cpu": [s, ...], "peak_mb": m}, per step.
{"save": path}: write the weights in canonical form; answers {"k": k or null}.
"""

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rudder.sae_models.bench.learners import Learner, Task, learner


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rudder.sae_models.bench.worker", description=__doc__)
    parser.add_argument("--library", required=True)
    parser.add_argument("--data", type=Path, required=True)
    return parser.parse_args()


def steps(trainer: Learner, x: Tensor, batch: int, steps_done: int, count: int) -> dict[str, Any]:
    """Take `count` steps after the first `steps_done`; time each by wall clock and CPU."""
    wall, cpu = [], []
    for i in range(steps_done, steps_done + count):
        part = x[i * batch : (i + 1) * batch]
        start, used = time.perf_counter(), time.process_time()
        trainer.step(part)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {"wall": wall, "cpu": cpu, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def save_weights(trainer: Learner, path: str) -> dict[str, Any]:
    """Write the weights."""
    weights, k = trainer.weights()
    save_file({name: t.detach().float().contiguous() for name, t in weights.items()}, path)
    return {"k": k}


def answers(library: str, x: Tensor, commands: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Execute commands and yield their answers."""
    for line in commands:
        match json.loads(line):
            case {"mode": mode, "task": settings}:
                task = Task(**settings)
                torch.set_num_threads(task.threads)
                trainer, steps_done = learner(library, mode, task, x[: task.sample]), 0
                yield {}
            case {"steps": count}:
                yield steps(trainer, x, task.batch, steps_done, count)
                steps_done += count
            case {"save": path}:
                yield save_weights(trainer, path)


def main() -> int:
    """Execute commands until standard input ends."""
    options = arguments()
    x = load_file(options.data)["train"]
    output = sys.stdout
    # Libraries print to standard output, which must carry answers only.
    with contextlib.redirect_stdout(sys.stderr):
        for answer in answers(options.library, x, sys.stdin):
            print(json.dumps(answer), file=output, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
