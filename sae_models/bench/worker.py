"""One library's trainer in a process of its own, stepped by commands on standard input, one JSON object a line.

{"mode": m, "task": {...}}: begins anew; answers {}.
{"steps": n}: takes n steps; answers {"wall": [s, ...], "cpu": [s, ...], "peak_mb": m}, per step.
{"save": path}: writes the weights in canonical form; answers {"k": k or null}.
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


def steps(trained: Learner, x: Tensor, batch: int, done: int, count: int) -> dict[str, Any]:
    """Takes `count` steps after `done`, each timed by the wall and by the processors."""
    wall, cpu = [], []
    for i in range(done, done + count):
        part = x[i * batch : (i + 1) * batch]
        start, used = time.perf_counter(), time.process_time()
        trained.step(part)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {"wall": wall, "cpu": cpu, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def saved(trained: Learner, path: str) -> dict[str, Any]:
    """Writes the weights."""
    weights, k = trained.weights()
    save_file({name: t.detach().float().contiguous() for name, t in weights.items()}, path)
    return {"k": k}


def answers(library: str, x: Tensor, commands: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Obeys commands."""
    for line in commands:
        match json.loads(line):
            case {"mode": mode, "task": settings}:
                task = Task(**settings)
                torch.set_num_threads(task.threads)
                trained, done = learner(library, mode, task, x[: task.sample]), 0
                yield {}
            case {"steps": count}:
                yield steps(trained, x, task.batch, done, count)
                done += count
            case {"save": path}:
                yield saved(trained, path)


def main() -> int:
    """Obeys until standard input ends."""
    options = arguments()
    x = load_file(options.data)["train"]
    output = sys.stdout
    # Libraries print; the answers alone go to standard output.
    with contextlib.redirect_stdout(sys.stderr):
        for answer in answers(options.library, x, sys.stdin):
            print(json.dumps(answer), file=output, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
