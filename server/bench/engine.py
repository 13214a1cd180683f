"""`rudder bench engine`: plain vLLM against Rudder, alternating in one run, each in a process of its own."""

import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sae_models.points import parse
from server import config as configuration
from server.bench.shapes import SHAPES, write_bundle, write_model

WATCHED = 64
# The server process and a client process, against the engine in one process.
GRPC = "grpc"
PROGRAM_EDITS = 4


@dataclass(frozen=True)
class Load:
    """The load, and the bank it meets."""

    shape: str = "llama-100m"
    requests: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 128
    pairs: int = 5
    rows: int = 256
    latents: int = 16384
    sites: int = 1
    programs: int = 64
    eager: bool = False
    cases: tuple[str, ...] = ()

    def all_cases(self) -> tuple[str, ...]:
        """Names of the cases to run."""
        size = f"{self.latents // 1024}k"
        watch = f"watch_{WATCHED}_features"
        names = ("idle", "one_program", f"{self.programs}_programs", watch, f"full_encode_{size}", GRPC)
        return tuple(name for name in names if not self.cases or name in self.cases)


def run(load: Load, output: Path | None) -> dict[str, Any]:
    """Run every case and write the result. `pairs`: (plain, Rudder) tokens per second, one after the other."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="rudder-bench-") as folder:
        model, bundle = prepare(Path(folder), load)
        sides = ("plain", "rudder", GRPC) if GRPC in load.all_cases() else ("plain", "rudder")
        with ExitStack() as running:
            started = {name: running.enter_context(Side(name, model, bundle, load)) for name in sides}
            result = {"machine": machine(), "load": asdict(load), "cases": measure(load, started, console)}
    console.print(table(result["cases"]))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def measure(load: Load, sides: dict[str, "Side"], console: Console) -> dict[str, Any]:
    """Alternate two sides, case by case; the first pair of each case warms up."""
    cases: dict[str, Any] = {}
    with Progress(console=console) as progress:
        bar = progress.add_task("pairs", total=len(load.all_cases()) * (load.pairs + 1))
        for case in load.all_cases():
            base, ours = ("rudder", GRPC) if case == GRPC else ("plain", "rudder")
            pairs = []
            for number in range(load.pairs + 1):
                order = (base, ours) if number % 2 else (ours, base)
                runs = {name: sides[name].measure(case) for name in order}
                pairs.append((runs[base], runs[ours]))
                progress.advance(bar)
            cases[case] = summary(pairs[1:])
    return cases


def summary(pairs: list[tuple["Run", "Run"]]) -> dict[str, Any]:
    """The case's entry of the result."""
    base, ours = zip(*pairs, strict=True)
    return {
        "plain_tok_s": round(statistics.median(run.tok_s for run in base), 1),
        "tok_s": round(statistics.median(run.tok_s for run in ours), 1),
        "ratio": round(statistics.median(b.tok_s / a.tok_s for a, b in pairs), 4),
        "pairs": [[round(a.tok_s, 1), round(b.tok_s, 1)] for a, b in pairs],
        "first_token_added_ms": round(statistics.median(b.first_ms - a.first_ms for a, b in pairs), 2),
    }


def table(cases: dict[str, Any]) -> Table:
    """The cases for people."""
    shown = Table("case", "plain tok/s", "Rudder tok/s", "ratio", "ratios of the pairs")
    for name, case in cases.items():
        ratios = " ".join(f"{b / a:.3f}" for a, b in case["pairs"])
        shown.add_row(name, f"{case['plain_tok_s']:.0f}", f"{case['tok_s']:.0f}", f"{case['ratio']:.3f}", ratios)
    return shown


def machine() -> dict[str, Any]:
    """Where this was measured."""
    import torch
    import vllm

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "vllm": vllm.__version__}


def sites_of(load: Load) -> tuple[str, ...]:
    """The bundle's site in the middle, and as many others as asked for."""
    layers = SHAPES[load.shape].layers
    middle = layers // 2
    others = [layer for layer in range(layers) if layer != middle]
    return tuple(f"layers.{layer}.resid_post" for layer in [middle, *others][: load.sites])


def prepare(folder: Path, load: Load) -> tuple[Path, Path]:
    """Write the model and the bundle."""
    shape = SHAPES[load.shape]
    model = write_model(folder / "model", shape)
    write_bundle(folder / "bundle", sites_of(load)[0], shape.width, load.latents).catalogue.close()
    return model, folder / "bundle"


@dataclass(frozen=True)
class Run:
    """One run of the load: tokens per second, and the median time to a request's first token."""

    tok_s: float
    first_ms: float


class Side:
    """One engine in a process of its own, which runs the load when told."""

    def __init__(self, name: str, model: Path, bundle: Path, load: Load) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=side_main, args=(name, str(model), str(bundle), load, theirs))

    def __enter__(self) -> "Side":
        self.process.start()
        self.receive()
        return self

    def __exit__(self, *exception: object) -> None:
        self.pipe.send(None)
        self.process.join(30)
        self.process.terminate()

    def measure(self, case: str) -> Run:
        """Run the load once."""
        self.pipe.send(case)
        run: Run = self.receive()
        return run

    def receive(self) -> Any:
        """The process's next answer; RuntimeError when it has died."""
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise RuntimeError(f"the {self.name} engine stopped with exit code {self.process.exitcode}")
        return self.pipe.recv()


def side_main(name: str, model: str, bundle: str, load: Load, pipe: Connection) -> None:
    """The process of one side."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    asyncio.run(serve_side(name, model, bundle, load, pipe))


async def serve_side(name: str, model: str, bundle: str, load: Load, pipe: Connection) -> None:
    """Start the engine, then run the load for every case that comes through the pipe."""
    config = configuration.Config(
        engine=configuration.Engine(
            model=model, bundles=(bundle,), sites=sites_of(load)[1:], sequence_sites=sites_of(load)[:1], rows=load.rows,
            max_num_seqs=load.requests, slots=load.requests, max_model_len=1024, max_num_batched_tokens=2048,
            kv_cache_memory_bytes=2 << 30, dtype="bfloat16", enforce_eager=load.eager, load_format="dummy",
        ),
        programs=configuration.Programs(folder=None),
    )  # fmt: skip
    start = {"plain": start_plain, "rudder": start_rudder, GRPC: start_grpc}[name]
    generate, stop = await start(config, load)
    pipe.send("ready")
    loop = asyncio.get_running_loop()
    while case := await loop.run_in_executor(None, pipe.recv):
        begin = time.perf_counter()
        first = await asyncio.gather(*(drain(generate(case, number)) for number in range(load.requests)))
        rate = load.requests * load.new_tokens / (time.perf_counter() - begin)
        pipe.send(Run(rate, 1e3 * statistics.median(first)))
    stop()


Generate = Callable[[str, int], AsyncIterator[Any]]


async def drain(outputs: AsyncIterator[Any]) -> float:
    """Read a stream to its end; seconds to its first message."""
    begin, first = time.perf_counter(), 0.0
    async for _ in outputs:
        first = first or time.perf_counter() - begin
    return first


def sampling(load: Load) -> Any:
    """Greedy, of exact length, ids only."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=load.new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def prompt(load: Load, number: int) -> list[int]:
    """A prompt that shares no prefix with the others; BOS first."""
    return [1, *((7 * number + 13 * i) % 8000 + 2 for i in range(load.prompt_tokens - 1))]


async def start_plain(config: configuration.Config, load: Load) -> tuple[Generate, Callable[[], None]]:
    """Unmodified vLLM with the same arguments."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engine.engine import engine_args
    from server.engine.layout import Layout

    args = engine_args(config, Layout(sites_of(load)))
    llm = AsyncLLM.from_engine_args(replace(args, worker_cls="auto", additional_config={}))

    def generate(_case: str, number: int) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = llm.generate(
            {"prompt_token_ids": prompt(load, number)}, sampling(load), f"{time.perf_counter_ns()}-{number}"
        )
        return outputs

    return generate, llm.shutdown


async def start_rudder(config: configuration.Config, load: Load) -> tuple[Generate, Callable[[], None]]:
    """Rudder's engine, self-tested."""
    from rudder.v1 import program_pb2
    from server.engine import selftest
    from server.engine.engine import Engine
    from server.steering.compile import compile_program
    from server.steering.watch import compile_watch

    engine = await Engine.start(config)
    await selftest.run(engine)
    programs = [compile_program(program_of(load, number), engine.registry) for number in range(load.programs)]
    features = [program_pb2.Row(feature=program_pb2.Feature(index=i)) for i in range(WATCHED)]
    watch = compile_watch([(sites_of(load)[0], row) for row in features], engine.registry, "watch")

    def generate(case: str, number: int) -> AsyncIterator[Any]:
        return engine.stream(call_of(case, number, load, programs, watch))

    return generate, engine.llm.shutdown


async def start_grpc(config: configuration.Config, load: Load) -> tuple[Generate, Callable[[], None]]:
    """A server process, reached by the Python client in this one."""
    from rudder_client import AsyncClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listening = replace(config, listen=configuration.Listen(port=port, metrics_port=0))
    settings = Path(config.engine.bundles[0]).with_suffix(".yaml")
    settings.write_text(configuration.show(listening))
    server = await asyncio.create_subprocess_exec(sys.executable, "-m", "server", "serve", "--config", str(settings))
    client = AsyncClient(f"127.0.0.1:{port}")
    await client.wait_ready(timeout=600)

    def generate(_case: str, number: int) -> AsyncIterator[Any]:
        stream = client.generate(prompt(load, number), temperature=0.0, max_tokens=load.new_tokens, ignore_eos=True)
        return aiter(stream)

    return generate, server.terminate


def call_of(case: str, number: int, load: Load, programs: list[Any], watch: Any) -> Any:
    """Request `number` of a case."""
    from server.engine.call import Call

    site = sites_of(load)[0]
    more: dict[str, Any] = {}
    if case.endswith("program"):
        more = {"compiled": programs[0]}
    if case.endswith("programs"):
        more = {"compiled": programs[number % len(programs)]}
    if case.startswith("watch"):
        more = {"watch": watch}
    if case.startswith("full_encode"):
        more = {"top_k": 8, "top_k_sites": (site,)}
    return Call(tuple(prompt(load, number)), sampling(load), **more)


def program_of(load: Load, number: int) -> Any:
    """A program that edits a few latents at the bundle's site and pushes at every other one."""
    from rudder.v1 import program_pb2

    edits = [
        program_pb2.Edit(
            row=program_pb2.Row(feature=program_pb2.Feature(index=(3 * number + i) % (load.rows // 2))), clamp=-1.0
        )
        for i in range(PROGRAM_EDITS)
    ]
    width = SHAPES[load.shape].width
    vector = program_pb2.Vector(name="push", values=[0.01] * width)
    push = program_pb2.Edit(row=program_pb2.Row(vector=vector), add=1.0 + number)
    first, *others = sorted(sites_of(load), key=lambda site: (site != sites_of(load)[0], parse(site)))
    sites = [program_pb2.SiteEdits(site=first, edits=edits)]
    return program_pb2.Program(sites=[*sites, *(program_pb2.SiteEdits(site=site, edits=[push]) for site in others)])
