"""`rudder bench engine`: compare plain vLLM with Rudder, alternating in one run, each in a process of its own."""

import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from rudder.sae_models.settings import ConfigError
from rudder.server.bench.load import GRPC, POLICY, Run, Subject, shipped_subject, sites_of
from rudder.server.bench.load import Load as Load
from rudder.server.bench.shapes import SHAPES, write_bundle, write_model
from rudder.server.engine.parent import Target
from rudder.server.models import known, served


def run(
    load: Load, output: Path | None, on_result: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Run every case, and after each pair write the result to `output` and call `on_result` with it.

    `pairs` of the result: (plain, Rudder) tokens per second, in the order of the starts.
    """
    console = Console(stderr=True)
    known = msgspec.structs.replace(load, cases=()).all_cases()
    if unknown := [case for case in load.cases if case not in known]:
        raise ConfigError("cases", f"{unknown[0]!r} is not one of {', '.join(known)}")
    cases = load.all_cases()
    pairs: dict[str, list[Pair]] = {case: [] for case in cases}
    result: dict[str, Any] = {"cases": {}}
    with tempfile.TemporaryDirectory(prefix="rudder-bench-") as folder, Progress(console=console) as progress:
        subject = prepare(Path(folder), load)
        rounds = [len(warm_up_cases(group, load)) + load.pairs * len(group) for _, group in groups(cases)]
        bar = progress.add_task("pairs", total=load.starts * sum(rounds))

        def report(line: str) -> None:
            # Above the bar on a terminal; elsewhere there is no bar, and a run takes half an hour.
            progress.console.print(line, highlight=False)

        for number in range(load.starts):
            for names, group in groups(cases):
                order = names if number % 2 else names[::-1]
                report(f"start {number + 1} of {load.starts}: starting {' and '.join(order)}")
                with started([Side(name, subject, load) for name in order]) as sides:
                    for case, pair in measure(group, load, sides):
                        report(pair_line(case, pair))
                        progress.advance(bar)
                        pairs[case] += [] if pair.warm_up else [(pair.base, pair.ours)]
                        # A run takes half an hour: an interrupted one keeps its results.
                        result = save(load, pairs, output)
                        on_result(result)
    console.print(table(result["cases"]))
    return result


def save(load: Load, pairs: Mapping[str, Sequence["Pair"]], output: Path | None) -> dict[str, Any]:
    """Summarise the pairs so far and write the result to `output`."""
    cases = {case: summary(results, load) for case, results in pairs.items() if results}
    result = {"machine": machine(), "load": msgspec.to_builtins(load), "cases": cases}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def sides_of(case: str) -> tuple[str, str]:
    """Return the two engines that a case compares. Only they run at the time: an idle engine takes 2 % of a core."""
    return {GRPC: ("rudder", GRPC), POLICY: ("plain", POLICY)}.get(case, ("plain", "rudder"))


def groups(cases: Sequence[str]) -> list[tuple[tuple[str, str], list[str]]]:
    """Group the cases by the engines that they compare."""
    return [(sides, list(group)) for sides, group in groupby(cases, sides_of)]


def warm_up_cases(cases: Sequence[str], load: Load) -> Sequence[str]:
    """Return the cases that begin with a pair that is not counted, after each start."""
    return cases if load.warm_up == "case" else cases[:1]


def measure(cases: Sequence[str], load: Load, sides: Mapping[str, "Side"]) -> Iterator[tuple[str, "Measured"]]:
    """Alternate between two sides, and yield each case's pairs as they are measured, one of each case a round.

    An interrupted start then has pairs of every case.
    """
    for number in range(load.pairs + 1):
        for case in cases if number else warm_up_cases(cases, load):
            base, ours = sides_of(case)
            runs = {name: sides[name].measure(case) for name in ((base, ours) if number % 2 else (ours, base))}
            yield case, Measured(runs[base], runs[ours], warm_up=number == 0)


def pair_line(case: str, pair: "Measured") -> str:
    """Describe a pair in a line."""
    base, ours = sides_of(case)
    speeds = f"{base} {pair.base.tok_s:.0f} tok/s, {ours} {pair.ours.tok_s:.0f} tok/s"
    warm_up = " (warm-up, not counted)" if pair.warm_up else ""
    return f"{case}: {speeds}, ratio {pair.ours.tok_s / pair.base.tok_s:.3f}{warm_up}"


def summary(pairs: Sequence["Pair"], load: Load) -> dict[str, Any]:
    """Summarise the pairs of a case."""
    base, ours = zip(*pairs, strict=True)
    ratios = [b.tok_s / a.tok_s for a, b in pairs]
    starts = [ratios[first : first + load.pairs] for first in range(0, len(ratios), load.pairs)]
    return {
        "plain_tok_s": round(statistics.median(run.tok_s for run in base), 1),
        "tok_s": round(statistics.median(run.tok_s for run in ours), 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_of_each_start": [round(statistics.median(part), 4) for part in starts],
        "pairs": [[round(a.tok_s, 1), round(b.tok_s, 1)] for a, b in pairs],
        "plain_tpot_ms": round(statistics.median(run.tpot_ms for run in base), 3),
        "tpot_ms": round(statistics.median(run.tpot_ms for run in ours), 3),
        "plain_first_token_ms": round(statistics.median(run.first_ms for run in base), 1),
        "first_token_ms": round(statistics.median(run.first_ms for run in ours), 1),
        "first_token_added_ms": round(statistics.median(b.first_ms - a.first_ms for a, b in pairs), 2),
    }


def table(cases: dict[str, Any]) -> Table:
    """Format the cases as a table."""
    shown = Table(Column("case", no_wrap=True), "plain", "Rudder", "ratio", "of each start", "first token")
    shown.caption = "plain and Rudder: tokens a second"
    for name, case in cases.items():
        ratios = " ".join(f"{ratio:.3f}" for ratio in case["ratio_of_each_start"])
        speeds = (f"{case[side]:.0f}" for side in ("plain_tok_s", "tok_s"))
        shown.add_row(name, *speeds, f"{case['ratio']:.3f}", ratios, f"{case['first_token_added_ms']:+.0f} ms")
    return shown


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of PyTorch and vLLM."""
    import torch
    import vllm

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "vllm": vllm.__version__}


def prepare(folder: Path, load: Load) -> Subject:
    """Return what is measured: a model with its bundles, or random ones, which are written into the folder."""
    if load.model != "random":
        return shipped_subject(folder, known.get(load.model), tuple(served.instruct_bundles()))
    shape, sites = SHAPES[load.shape], sites_of(load)
    model, bundle = write_model(folder / "model", shape), folder / "bundle"
    write_bundle(bundle, sites[0], shape.width, load.latents, k=load.k).catalogue.close()
    token_bytes = 2 * 2 * shape.layers * shape.kv_heads * (shape.width // shape.heads)
    return Subject(folder, model, (bundle,), sites, shape.width, token_bytes)


Pair = tuple[Run, Run]


class Measured(NamedTuple):
    """A pair of runs, of the engine that a case starts from and of that which it measures."""

    base: Run
    ours: Run
    warm_up: bool


@contextmanager
def started(sides: Sequence["Side"]) -> Iterator[dict[str, "Side"]]:
    """Start engines, one after the other on a CPU; on a GPU all at once, since most of a start is compilation."""
    import torch

    with ExitStack() as running:
        for side in sides:
            running.enter_context(side)
            if not torch.cuda.is_available():
                side.receive()
        for side in sides if torch.cuda.is_available() else ():
            side.receive()
        yield {side.name: side for side in sides}


class Side:
    """One engine in a process of its own, which sends a message when it has started, and runs the load on `measure`."""

    def __init__(self, name: str, subject: Subject, load: Load) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, self.theirs = context.Pipe()
        self.process = context.Process(target=Target(side_main), args=(name, subject, load, self.theirs))

    def __enter__(self) -> "Side":
        self.process.start()
        self.theirs.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.pipe.send(None)
            self.process.join(30)
        # Its engine ends with it.
        self.process.kill()
        self.process.join()

    def measure(self, case: str) -> Run:
        """Run the load once."""
        self.pipe.send(case)
        run: Run = self.receive()
        return run

    def receive(self) -> Any:
        """Return the process's next answer. Raises RuntimeError if it died."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the {self.name} engine stopped with exit code {self.process.exitcode}") from None


def side_main(name: str, subject: Subject, load: Load, pipe: Connection) -> None:
    """Entry point of the process of one side."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from rudder.server.bench import sides

    asyncio.run(sides.serve(name, subject, load, pipe))
