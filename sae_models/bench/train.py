"""Trains the same SAEs on the same activations with Rudder and with other people's libraries, and compares.

    rudder bench train --peers-python PEERS/bin/python --json train.json

PEERS is an environment with requirements/peers.txt. Every library runs its own training step in a process of its own;
data are in memory for all. The processes take turns of a few steps, so that other load meets all alike, and times are
medians over turns. A library runs in the fastest of its modes that works here, at the learning rate of --rates (its own
default among them) that gives it the best FVU at a quarter of the tokens and an eighth of the latents.

FVU is taken on held-out activations at equal L0: where an SAE has more than k active latents a token on average, one
threshold more keeps the k * n largest. `l0` is what it has by itself.
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

from rudder.sae_models import sae as canonical
from rudder.sae_models.bench import activations
from rudder.sae_models.bench.learners import Task
from rudder.sae_models.sae import SAE, TopK

CASES = ("topk", "batch_topk", "jumprelu", "gated")
# Those that each library itself offers on a CPU.
MODES = {
    "ours": ("bfloat16",),
    "sae-lens": ("float32", "autocast"),
    "dictionary-learning": ("float32",),
    "eai-sparsify": ("float32",),
}
ONLY = {"eai-sparsify": ("topk",)}
# And those it gets where the benchmark wraps its step in autocast.
WRAPPED = {"dictionary-learning": ("float32", "autocast"), "eai-sparsify": ("float32", "autocast")}
PLANTED, ACTIVE, HELD = 8_000, 24, 16_384
# Not that of any trainer: the same random directions would be its first dictionary.
DATA_SEED = 20_260_731
SMALLER, SHORTER, PROBES = 8, 4, 2


class Worker:
    """A process with one library's trainer."""

    def __init__(self, python: str, library: str, data: Path) -> None:
        command = [python, "-m", "rudder.sae_models.bench.worker", "--library", library, "--data", str(data)]
        self.errors = data.with_name(f"{library}.log")
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ask(self, **command: Any) -> Any:
        """The answer to a command. RuntimeError: the process ended; the last line of its errors."""
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
        """A new SAE."""
        self.ask(mode=entrant.mode, task=asdict(replace(task, rate=entrant.rate)))

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Entrant:
    """A library in a mode at a learning rate (None: its own)."""

    library: str
    mode: str
    rate: float | None = None


@dataclass(frozen=True)
class Bench:
    """The peers' interpreter, the file of activations, and held-out ones [n, d]."""

    peers: str
    data: Path
    held: Tensor

    @contextmanager
    def worker(self, library: str) -> Iterator[Worker]:
        """A worker of a library."""
        made = Worker(sys.executable if library == "ours" else self.peers, library, self.data)
        try:
            yield made
        finally:
            made.close()

    @torch.no_grad()
    def quality(self, worker: Worker, task: Task) -> dict[str, float]:
        """FVU on held-out activations at an L0 of at most k; L0 and share of dead latents before that."""
        path = self.data.with_name("weights.safetensors")
        k = worker.ask(save=str(path))["k"]
        weights = load_file(path)
        names = "encoder", "bias", "threshold", "decoder", "decoder_bias"
        sae = SAE(*(weights[name] for name in names), selection=None if k is None else TopK(k))
        fired, counts, outputs = torch.zeros(sae.latents), [], []
        for part in self.held.split(4096):
            f = sae.encode(part)
            fired += (f > 0).sum(0)
            counts.append(canonical.l0(f))
            outputs.append(sae.decode(strongest(f, task.k)))
        fvu = canonical.fvu(self.held, torch.cat(outputs))
        return {"fvu": fvu, "l0": statistics.mean(counts), "dead": float((fired == 0).float().mean())}


def strongest(f: Tensor, k: int) -> Tensor:
    """Activations f [n, F] of which the k * n largest are kept."""
    most = k * len(f)
    positive = f[f > 0]
    if len(positive) <= most:
        return f
    cut = positive.kthvalue(len(positive) - most).values
    return torch.where(f > cut, f, 0.0)


def prepared(bench: Bench, library: str, modes: Sequence[str], task: Task, rates: Sequence[float]) -> Entrant | None:
    """The library in its fastest mode at its best learning rate; None where no mode works."""
    times = {mode: seconds for mode in modes if (seconds := probed(bench, Entrant(library, mode), task)) is not None}
    if not times:
        return None
    mode = min(times, key=lambda one: times[one])
    small = replace(task, latents=task.latents // SMALLER, steps=max(8, task.steps // SHORTER))
    with bench.worker(library) as worker:
        losses = {}
        for rate in (None, *rates):
            worker.begin(Entrant(library, mode, rate), small)
            worker.ask(steps=small.steps)
            losses[rate] = bench.quality(worker, small)["fvu"]
    return Entrant(library, mode, min(losses, key=lambda rate: losses[rate]))


def probed(bench: Bench, entrant: Entrant, task: Task) -> float | None:
    """CPU seconds of a step of half a batch; None, said on standard error, where the library cannot do it."""
    try:
        with bench.worker(entrant.library) as worker:
            worker.begin(entrant, replace(task, batch=task.batch // 2))
            seconds: list[float] = worker.ask(steps=1 + PROBES)["cpu"]
            return min(seconds[1:])
    except RuntimeError as error:
        tqdm.write(f"{task.case}: {entrant.library} {entrant.mode}: {error}", file=sys.stderr)
        return None


def race(bench: Bench, entrants: Sequence[Entrant], task: Task, turn: int) -> dict[str, dict[str, Any]]:
    """Steps all entrants in turns until each has taken all steps; their speed and quality, by library."""
    with ExitStack() as stack:
        workers = [stack.enter_context(bench.worker(entrant.library)) for entrant in entrants]
        for entrant, worker in zip(entrants, workers, strict=True):
            worker.begin(entrant, task)
        turns = tqdm(range(task.steps // turn), desc=task.case, unit="turn", leave=False)
        answers = [[worker.ask(steps=turn) for worker in workers] for _ in turns]
        found = {}
        for entrant, worker, seen in zip(entrants, workers, zip(*answers, strict=True), strict=True):
            chosen = {"mode": entrant.mode, "learning_rate": entrant.rate or "default"}
            found[entrant.library] = speed(seen, task) | bench.quality(worker, task) | chosen
    return found


def speed(answers: Sequence[Any], task: Task) -> dict[str, Any]:
    """Tokens a second by wall and by CPU time, medians over all turns but the first; peak memory of the process."""
    wall = [statistics.mean(answer["wall"]) for answer in answers[1:]]
    cpu = [statistics.mean(answer["cpu"]) for answer in answers[1:]]
    return {
        "tok_s": task.batch / statistics.median(wall),
        "tok_cpu_s": task.batch / statistics.median(cpu),
        "peak_mb": max(answer["peak_mb"] for answer in answers),
        "turns": wall,
    }


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of one case: ours, peers, and how many times faster than each ours is, as a median of turns."""
    ours = found["ours"]
    for result in found.values():
        turns = zip(result["turns"], ours["turns"], strict=True)
        result["ours_is_faster"] = statistics.median(theirs / mine for theirs, mine in turns)
        result["ours_is_faster_cpu"] = ours["tok_cpu_s"] / result["tok_cpu_s"]
    results = {library: {k: v for k, v in result.items() if k != "turns"} for library, result in found.items()}
    return {"ours": results.pop("ours"), "peers": results}


def case_of(bench: Bench, task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one case."""
    modes = MODES | (WRAPPED if options.wrapped else {})
    libraries = [library for library in modes if task.case in ONLY.get(library, CASES)]
    found = [prepared(bench, library, modes[library], task, options.rates) for library in libraries]
    return compared(race(bench, [entrant for entrant in found if entrant is not None], task, options.turn))


def write_data(path: Path, tokens: int, d: int) -> None:
    """Training and held-out activations."""
    g = torch.Generator().manual_seed(DATA_SEED)
    planted = activations.directions(PLANTED, d, g)
    train = activations.activations(tokens, planted, ACTIVE, g)
    save_file({"train": train, "held": activations.activations(HELD, planted, ACTIVE, g)}, path)


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
    """Exit status 0."""
    options = arguments(argv)
    steps = options.tokens // options.batch // options.turn * options.turn
    base = Task("", options.width, options.latents, options.k, options.batch, steps, None, options.threads)
    about = {
        "activations": f"synthetic: {ACTIVE} of {PLANTED} directions a token, Zipf law, log-normal strengths, noise",
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(options.threads)
        data = Path(folder) / "activations.safetensors"
        write_data(data, steps * options.batch, options.width)
        bench = Bench(options.peers_python, data, load_file(data)["held"])
        for case in options.cases:
            cases[case] = case_of(bench, replace(base, case=case), options)
            options.json.write_text(json.dumps({"about": about, "cases": cases}, indent=1))
            print(json.dumps({case: cases[case]}, indent=1))
    return 0
