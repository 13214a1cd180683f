"""`rudder bench load`: stock vLLM's two servers and Rudder under the same load, by turns in one run."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from rudder.sae_models.settings import ConfigError
from rudder.server.bench import engine
from rudder.server.bench.load import Subject
from rudder.server.bench.serving.figures import figures
from rudder.server.bench.serving.offered import SYSTEMS, Job, Offered, Recorded
from rudder.server.bench.serving.servers import Server, serving

REFERENCE = "vllm_openai"
SHOWN = {
    "tok_s": "tok/s", "ttft_ms_p50": "TTFT p50", "ttft_ms_p99": "p99", "itl_ms_p50": "ITL p50", "itl_ms_p99": "p99",
    "goodput_relaxed": "good/s", "goodput_strict": "strict", "server_cpu_s": "CPU s", "client_cpu_s": "client",
}  # fmt: skip
Measured = dict[str, float]


def run(offered: Offered, peers: Path | None, output: Path | None) -> dict[str, Any]:
    """Measure every system, and after each round write the result to `output`."""
    console = Console(stderr=True)
    systems = systems_of(offered, peers)
    results: dict[str, dict[str, list[Measured]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="rudder-bench-") as folder,
        ExitStack() as running,
        Progress(console=console) as progress,
    ):
        load = offered.engine_load()
        subject = engine.prepare(Path(folder), load)
        names = sorted({SYSTEMS[system][0] for system in systems})
        bar = progress.add_task("starting servers", total=len(names))
        servers = dict[str, Server]()
        for name in names:
            servers[name] = running.enter_context(serving(name, subject, load, peers))
            progress.advance(bar)
        bar = progress.add_task("measurements", total=len(systems) * len(cases(offered)) * (offered.rounds + 1))
        for number in range(offered.rounds + 1):
            for case, streams, share in cases(offered):
                order = systems if number % 2 else systems[::-1]
                for system in order:
                    rate = share * reference_rate(results, streams, offered) if share else 0.0
                    job = job_of(offered, system, servers, subject, streams, rate, seed=len(order) * number + 1)
                    measured = measure(job, servers[SYSTEMS[system][0]], peers)
                    progress.console.print(line(case, system, measured, number), highlight=False)
                    progress.advance(bar)
                    # The first round warms up; the open loop takes its rate from it.
                    results.setdefault(case, {}).setdefault(system, []).append(measured)
            save(offered, results, output)
    result = save(offered, results, output)
    for case, by_system in result["cases"].items():
        console.print(table(case, by_system))
    return result


def systems_of(offered: Offered, peers: Path | None) -> list[str]:
    """Return the systems to measure. Raises ConfigError where one is unknown, or needs a package that is not there."""
    if unknown := [name for name in offered.systems if name not in SYSTEMS]:
        raise ConfigError("systems", f"{unknown[0]!r} is not one of {', '.join(SYSTEMS)}")
    systems = list(offered.systems or SYSTEMS)
    if offered.open_loop and REFERENCE not in systems:
        raise ConfigError("systems", f"the open loop takes its rate from {REFERENCE}; or set open_loop to 0")
    if "vllm_grpc" in systems and not (peers and (peers / "smg_grpc_servicer").is_dir()):
        raise ConfigError("peers", "vllm_grpc needs a folder with smg-grpc-servicer: pip install --target FOLDER")
    return systems


def cases(offered: Offered) -> list[tuple[str, int, float]]:
    """Return name, streams, and share of the reference's rate (0: a closed loop) of each measurement of a round."""
    closed = [(f"closed_{streams}", streams, 0.0) for streams in offered.streams]
    opened = [(f"open_{streams}", streams, offered.open_loop) for streams in offered.streams if offered.open_loop]
    return [*closed, *opened]


def reference_rate(results: Mapping[str, Mapping[str, Sequence[Measured]]], streams: int, offered: Offered) -> float:
    """Return the requests a second that stock vLLM's server completed in its closed loops so far, the median."""
    speeds = [measured["tok_s"] for measured in results[f"closed_{streams}"][REFERENCE]]
    return statistics.median(speeds) / offered.new_tokens


def job_of(
    offered: Offered, system: str, servers: Mapping[str, Server], subject: Subject, streams: int, rate: float, seed: int
) -> Job:
    """Describe what the client of a system does."""
    server, protocol, programs = SYSTEMS[system]
    return Job(
        protocol=protocol, address=servers[server].address, model=str(subject.model), streams=streams,
        requests=offered.requests, prompt_tokens=offered.prompt_tokens, new_tokens=offered.new_tokens, seed=seed,
        rate=rate, programs=programs, site=subject.sites[0],
    )  # fmt: skip


def measure(job: Job, server: Server, peers: Path | None) -> Measured:
    """Run a client process, and return its figures and what the server took meanwhile."""
    paths = [str(peers)] if peers else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    before, _ = server.usage()
    done = subprocess.run(
        [sys.executable, "-m", "rudder.server.bench.serving.client"],
        input=msgspec.json.encode(job), stdout=subprocess.PIPE, env=environment, check=True,
    )  # fmt: skip
    after, peak = server.usage()
    recorded = msgspec.json.decode(done.stdout, type=Recorded)
    own = {"server_cpu_s": after - before, "server_peak_mib": peak}
    return figures(recorded, job.new_tokens) | own


def save(
    offered: Offered, results: Mapping[str, Mapping[str, Sequence[Measured]]], output: Path | None
) -> dict[str, Any]:
    """Summarise the rounds so far, without the first, and write them to `output`."""
    summaries = {
        case: {system: summary(runs[1:], by_system[REFERENCE][1:]) for system, runs in by_system.items() if runs[1:]}
        for case, by_system in results.items()
    }
    result = {"machine": engine.machine(), "load": msgspec.to_builtins(offered), "cases": summaries}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def summary(runs: Sequence[Measured], reference: Sequence[Measured]) -> dict[str, Any]:
    """Return the median of each figure, and each round's speed against stock vLLM's server of that round."""
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    ratios = [round(run["tok_s"] / other["tok_s"], 4) for run, other in zip(runs, reference, strict=False)]
    return medians | {"ratio_of_each_round": ratios}


def line(case: str, system: str, measured: Measured, number: int) -> str:
    """Describe a measurement in a line."""
    warm_up = "" if number else " (warm-up, not counted)"
    latencies = f"TTFT p99 {measured['ttft_ms_p99']:.0f} ms, ITL p99 {measured['itl_ms_p99']:.0f} ms"
    return f"{case} {system}: {measured['tok_s']:.0f} tok/s, {latencies}{warm_up}"


def table(case: str, by_system: Mapping[str, Measured]) -> Table:
    """Format the systems of a case as a table."""
    columns = (Column(name, justify="right") for name in SHOWN.values())
    shown = Table(Column("system", no_wrap=True), *columns, title=case)
    for system in SYSTEMS:
        if measured := by_system.get(system):
            shown.add_row(system, *(f"{measured[name]:.1f}" for name in SHOWN))
    return shown
