"""Train the same SAEs on the same activations with Rudder and with other libraries, and compare speed and quality.

    rudder bench train --peers-python PEERS/bin/python --json train.json

PEERS is .venv-conformance (`make conformance`). Every library runs its own training step in its own process; data
are in memory for all. The processes take turns of a few steps, so that other load affects all alike, and times are
medians over turns. A library runs in the fastest of its modes that works on this machine, at the learning rate of
--rates (or its default) that gives the best FVU at a quarter of the tokens and an eighth of the latents.

FVU is measured on held-out activations at equal L0: if an SAE has more than k active latents per token on average, an
additional threshold keeps the k * n largest. `l0` is the value without it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import fidelity, precision
from rudder.sae_models.bench import activations
from rudder.sae_models.bench.learners import Task
from rudder.sae_models.sae import SAE, TopK

CASES = ("topk", "batch_topk", "jumprelu", "gated")
# Modes that each library itself offers on a CPU.
MODES = {
    "ours": (precision.fast_precision("cpu"),),
    "sae-lens": ("float32", "autocast"),
    "dictionary-learning": ("float32",),
    "eai-sparsify": ("float32",),
}
SUPPORTED_CASES = {"eai-sparsify": ("topk",)}
# Modes with --wrapped: the benchmark also wraps steps in autocast.
WRAPPED_MODES = {"dictionary-learning": ("float32", "autocast"), "eai-sparsify": ("float32", "autocast")}
DIRECTIONS, ACTIVE_PER_TOKEN, HELD_OUT_TOKENS = 8_000, 24, 16_384
# Differs from the seed of every trainer: otherwise the planted directions would be its initial dictionary.
DATA_SEED = 20_260_731
LATENTS_DIVISOR, STEPS_DIVISOR, PROBE_STEPS = 8, 4, 2


class Worker:
    """A process with one library's trainer."""

    def __init__(self, python: str, library: str, data: Path) -> None:
        command = [python, "-m", "rudder.sae_models.bench.worker", "--library", library, "--data", str(data)]
        self.errors = data.with_name(f"{library}.log")
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def send(self, **command: Any) -> Any:
        """Send a command and return its answer. Raise RuntimeError with the last line of its log if the process has
        ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            raise RuntimeError((self.errors.read_text().strip().splitlines() or ["no message"])[-1])
        return json.loads(answer)

    def begin(self, entrant: "Entrant", task: Task) -> None:
        """Create a new SAE."""
        self.send(mode=entrant.mode, task=asdict(replace(task, rate=entrant.rate)))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Entrant:
    """A library in a mode at a learning rate (None: its default)."""

    library: str
    mode: str
    rate: float | None = None


@dataclass(frozen=True)
class Bench:
    """Python interpreter of the peers' environment, the file of activations, and held-out activations [n, d]."""

    peers: str
    data: Path
    held_out: Tensor

    @contextmanager
    def worker(self, library: str) -> Iterator[Worker]:
        """Within the block, run a worker of a library."""
        worker = Worker(sys.executable if library == "ours" else self.peers, library, self.data)
        try:
            yield worker
        finally:
            worker.close()

    @torch.no_grad()
    def quality(self, worker: Worker, task: Task) -> dict[str, float]:
        """Return FVU on held-out activations at an L0 of at most k, and without that limit L0, the share of dead
        latents, the number of dense latents and the share of activations that these carry.
        """
        path = self.data.with_name("weights.safetensors")
        k = worker.send(save=str(path))["k"]
        weights = load_file(path)
        names = "encoder", "bias", "threshold", "decoder", "decoder_bias"
        sae = SAE(*(weights[name] for name in names), selection=None if k is None else TopK(k))
        sums, outputs = fidelity.Fidelity(), []
        for part in self.held_out.split(4096):
            f = sae.encode(part)
            sums.add_latents(f)
            outputs.append(sae.decode(keep_largest(f, task.k)))
        fvu = fidelity.fvu(self.held_out, torch.cat(outputs))
        return {
            "fvu": fvu,
            "l0": sums.l0,
            "dead": sums.dead_share,
            "dense": sums.dense_latents(fidelity.DENSE),
            "dense_share": sums.dense_share(fidelity.DENSE),
        }


def keep_largest(f: Tensor, k: int) -> Tensor:
    """Keep the k * n largest of activations f [n, F]."""
    limit = k * len(f)
    positive = f[f > 0]
    if len(positive) <= limit:
        return f
    threshold = positive.kthvalue(len(positive) - limit).values
    return torch.where(f > threshold, f, 0.0)


def choose_entrant(
    bench: Bench, library: str, modes: Sequence[str], task: Task, rates: Sequence[float]
) -> Entrant | None:
    """Return the library in its fastest mode at its best learning rate, or None if no mode works."""
    times = {
        mode: seconds for mode in modes if (seconds := probe_seconds(bench, Entrant(library, mode), task)) is not None
    }
    if not times:
        return None
    mode = min(times, key=lambda mode: times[mode])
    small = replace(task, latents=task.latents // LATENTS_DIVISOR, steps=max(8, task.steps // STEPS_DIVISOR))
    with bench.worker(library) as worker:
        losses = {}
        for rate in (None, *rates):
            worker.begin(Entrant(library, mode, rate), small)
            worker.send(steps=small.steps)
            losses[rate] = bench.quality(worker, small)["fvu"]
    return Entrant(library, mode, min(losses, key=lambda rate: losses[rate]))


def probe_seconds(bench: Bench, entrant: Entrant, task: Task) -> float | None:
    """Return the CPU seconds of a step with half a batch; None, reported on standard error, if the library fails."""
    try:
        with bench.worker(entrant.library) as worker:
            worker.begin(entrant, replace(task, batch=task.batch // 2))
            seconds: list[float] = worker.send(steps=1 + PROBE_STEPS)["cpu"]
            return min(seconds[1:])
    except RuntimeError as error:
        tqdm.write(f"{task.case}: {entrant.library} {entrant.mode}: {error}", file=sys.stderr)
        return None


def race(bench: Bench, entrants: Sequence[Entrant], task: Task, turn: int) -> dict[str, dict[str, Any]]:
    """Step all entrants in turns until each has taken all steps; return their speed and quality by library."""
    with ExitStack() as stack:
        workers = [stack.enter_context(bench.worker(entrant.library)) for entrant in entrants]
        for entrant, worker in zip(entrants, workers, strict=True):
            worker.begin(entrant, task)
        turns = tqdm(range(task.steps // turn), desc=task.case, unit="turn", leave=False)
        answers = [[worker.send(steps=turn) for worker in workers] for _ in turns]
        results = {}
        for entrant, worker, timings in zip(entrants, workers, zip(*answers, strict=True), strict=True):
            setting = {"mode": entrant.mode, "learning_rate": entrant.rate or "default"}
            results[entrant.library] = speed(timings, task) | bench.quality(worker, task) | setting
    return results


def speed(answers: Sequence[Any], task: Task) -> dict[str, Any]:
    """Return tokens per second of wall and CPU time, medians over all turns but the first, and peak memory of the
    process.
    """
    wall = [statistics.mean(answer["wall"]) for answer in answers[1:]]
    cpu = [statistics.mean(answer["cpu"]) for answer in answers[1:]]
    return {
        "tok_s": task.batch / statistics.median(wall),
        "tok_cpu_s": task.batch / statistics.median(cpu),
        "peak_mb": max(answer["peak_mb"] for answer in answers),
        "turns": wall,
    }


def compare(by_library: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the results of one case: ours, peers, and the median over turns of how many times faster ours is than
    each.
    """
    ours = by_library["ours"]
    for result in by_library.values():
        turns = zip(result["turns"], ours["turns"], strict=True)
        result["ours_is_faster"] = statistics.median(other / own for other, own in turns)
        result["ours_is_faster_cpu"] = ours["tok_cpu_s"] / result["tok_cpu_s"]
    results = {library: {k: v for k, v in result.items() if k != "turns"} for library, result in by_library.items()}
    return {"ours": results.pop("ours"), "peers": results}


def run_case(bench: Bench, task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Run all libraries on one case."""
    modes = MODES | (WRAPPED_MODES if options.wrapped else {})
    libraries = [library for library in modes if task.case in SUPPORTED_CASES.get(library, CASES)]
    entrants = [choose_entrant(bench, library, modes[library], task, options.rates) for library in libraries]
    return compare(race(bench, [entrant for entrant in entrants if entrant is not None], task, options.turn))


def write_data(path: Path, tokens: int, d: int) -> None:
    """Write training and held-out activations."""
    g = torch.Generator().manual_seed(DATA_SEED)
    planted = activations.directions(DIRECTIONS, d, g)
    train = activations.synthetic_activations(tokens, planted, ACTIVE_PER_TOKEN, g)
    save_file(
        {"train": train, "held": activations.synthetic_activations(HELD_OUT_TOKENS, planted, ACTIVE_PER_TOKEN, g)}, path
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rudder bench train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    parser.add_argument("--peers-python", required=True, help="interpreter of an environment with the peers")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--tokens", type=int, default=102_400, help="tokens of a run (default %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=2048, help="tokens of a step, dictionary_learning's default (%(default)s)"
    )
    parser.add_argument("--width", type=int, default=768, help="default %(default)s")
    parser.add_argument("--latents", type=int, default=16_384, help="default %(default)s")
    parser.add_argument("--k", type=int, default=32, help="default %(default)s")
    parser.add_argument("--turn", type=int, default=2, help="steps of a turn (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--rates", type=float, nargs="*", default=(2e-3, 8e-3), help="learning rates beside a default")
    parser.add_argument("--wrapped", action="store_true", help="give every peer autocast, offered by it or not")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return exit status 0."""
    options = arguments(argv)
    steps = options.tokens // options.batch // options.turn * options.turn
    base = Task("", options.width, options.latents, options.k, options.batch, steps, None, options.threads)
    about = {
        "activations": (
            f"synthetic: {ACTIVE_PER_TOKEN} of {DIRECTIONS} directions a token, Zipf law, log-normal strengths, noise"
        ),
        # Where files lie says nothing of the measurement.
        "options": {n: str(v) for n, v in vars(options).items() if n not in ("json", "peers_python")},
    }
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(options.threads)
        data = Path(folder) / "activations.safetensors"
        write_data(data, steps * options.batch, options.width)
        bench = Bench(options.peers_python, data, load_file(data)["held"])
        for case in options.cases:
            cases[case] = run_case(bench, replace(base, case=case), options)
            options.json.write_text(json.dumps({"about": about, "cases": cases}, indent=1))
            print(json.dumps({case: cases[case]}, indent=1))
    return 0
