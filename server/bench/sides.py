"""The process of one side of `rudder bench engine`: an engine and the load on it.

vLLM is imported at module level: some of its modules keep the frames of failed imports alive, and with them the locals
of an importing function.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch
from google.protobuf import json_format
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind

from rudder.sae_models.hookpoints import parse
from rudder.server import config as configuration
from rudder.server.bench.load import GRPC, POLICY, WATCHED, Load, Run, Subject, kv_cache_bytes
from rudder.server.engine import selftest
from rudder.server.engine.adapter import AsyncLLM, engine_args, start_engine_process
from rudder.server.engine.call import Call
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.program.compile import compile_program
from rudder.server.program.layout import Layout
from rudder.server.program.watch import compile_watch
from rudder.server.safety.binding import stages_of
from rudder.server.safety.holdback import released
from rudder.server.safety.store import PolicyStore
from rudder.server.safety.verdicts import Findings, Siblings
from rudder.v1 import policy_pb2, program_pb2

PROGRAM_EDITS = 4
HOLD_BACK = 8


async def serve(name: str, subject: Subject, load: Load, pipe: Connection) -> None:
    """Start the engine, then run the load for every case received from the pipe."""
    config = config_of(subject, load)
    start = {"plain": start_plain, "rudder": start_rudder, POLICY: start_policy, GRPC: start_grpc}[name]
    generate, stop = await start(config, subject, load)
    pipe.send("ready")
    loop = asyncio.get_running_loop()
    numbers = count()
    while case := await loop.run_in_executor(None, pipe.recv):
        begin = time.perf_counter()
        times = await asyncio.gather(*(drain(generate(case, next(numbers))) for _ in range(load.requests)))
        rate = load.requests * load.new_tokens / (time.perf_counter() - begin)
        first_ms = 1e3 * statistics.median(first for first, _ in times)
        decode_s = statistics.median(last - first for first, last in times)
        pipe.send(Run(rate, first_ms, 1e3 * decode_s / max(load.new_tokens - 1, 1)))
    stop()


def config_of(subject: Subject, load: Load) -> configuration.Config:
    """Configure the engine for a load."""
    # Two engines share a GPU, whose free memory vLLM compares with a share although it is told the size of the cache.
    share = 0.1 if torch.cuda.is_available() else None
    return configuration.Config(
        engine=configuration.Engine(
            model=str(subject.model), bundles=tuple(map(str, subject.bundles)),
            sites=subject.sites[len(subject.bundles) :], sequence_sites=subject.sites[:1], rows=load.rows,
            max_num_seqs=load.requests, slots=load.requests, max_model_len=1024, max_num_batched_tokens=2048,
            kv_cache_memory_bytes=kv_cache_bytes(load, subject), gpu_memory_utilization=share,
            dtype="bfloat16" if subject.random else "auto", enforce_eager=load.eager,
            load_format="dummy" if subject.random else "auto",
        ),
        programs=configuration.Programs(folder=None),
    )  # fmt: skip


Generate = Callable[[str, int], AsyncIterator[Any]]


async def drain(outputs: AsyncIterator[Any]) -> tuple[float, float]:
    """Read a stream to its end; return the seconds to its first message and to its last."""
    begin, first, last = time.perf_counter(), 0.0, 0.0
    async for _ in outputs:
        last = time.perf_counter() - begin
        first = first or last
    return first, last


def sampling(load: Load) -> SamplingParams:
    """Return greedy sampling of exact length, with detokenization."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=load.new_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )


def prompt(load: Load, number: int) -> list[int]:
    """Return prompt `number`, counted over all runs: BOS and tokens that share no prefix with other prompts."""
    return [1, *((7 * number + 13 * i) % 8000 + 2 for i in range(load.prompt_tokens - 1))]


async def start_plain(
    config: configuration.Config, subject: Subject, load: Load
) -> tuple[Generate, Callable[[], None]]:
    """Start unmodified vLLM with the same arguments."""
    args = engine_args(config, Layout(subject.sites))
    llm = start_engine_process(plain_args(args), plain=True)
    return plain_requests(llm, load), llm.shutdown


def plain_args(args: AsyncEngineArgs) -> AsyncEngineArgs:
    """Return vLLM's arguments without the steering worker."""
    return replace(args, worker_cls="auto", additional_config={})


def plain_requests(llm: AsyncLLM, load: Load) -> Generate:
    """Return a function that starts a request, whatever the case."""

    def generate(_case: str, number: int) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = llm.generate(
            {"prompt_token_ids": prompt(load, number)}, sampling(load), f"{time.perf_counter_ns()}-{number}"
        )
        return outputs

    return generate


async def start_rudder(
    config: configuration.Config, subject: Subject, load: Load
) -> tuple[Generate, Callable[[], None]]:
    """Start Rudder's engine and run its self-test."""
    engine = await start_engine(config)
    await selftest.run(engine)
    return rudder_requests(engine, subject, load), engine.llm.shutdown


def rudder_requests(engine: Engine, subject: Subject, load: Load) -> Generate:
    """Return a function that starts request `number` of a case."""
    programs = [compile_program(program_of(subject, load, number), engine.registry) for number in range(load.programs)]
    sites = subject.sae_sites
    features = [program_pb2.Row(feature=program_pb2.Feature(index=i // len(sites))) for i in range(WATCHED)]
    rows = [(sites[i % len(sites)], row) for i, row in enumerate(features)]
    watch = compile_watch(rows, engine.registry, "watch")

    def generate(case: str, number: int) -> AsyncIterator[Any]:
        return engine.stream(call_of(case, number, subject, load, programs, watch))

    return generate


async def start_policy(
    config: configuration.Config, subject: Subject, load: Load
) -> tuple[Generate, Callable[[], None]]:
    """Start Rudder's engine with a policy, whose guards judge every token before it leaves."""
    staged = msgspec.structs.replace(config, policies=configuration.Policies(stages=1))
    engine = await start_engine(staged)
    await selftest.run(engine)
    policies = [await PolicyStore(engine, allow_uncertified=True).apply(policy_of(subject), "bench")]

    def generate(_case: str, number: int) -> AsyncIterator[Any]:
        call = Call(tuple(prompt(load, number)), sampling(load), policies=stages_of(policies))
        return released(engine, call, policies, Findings(), Siblings())

    return generate, engine.llm.shutdown


def policy_of(subject: Subject) -> policy_pb2.Policy:
    """Build a policy with a program and three guards on probes that never hold, at the bundle's site."""
    site = subject.sites[0]
    statistics: list[dict[str, Any]] = [
        {"moving_average": {"decay": 0.12}, "action": "GUARD_ACTION_STOP", "hold_back": HOLD_BACK},
        {"window": {"tokens": 16}, "action": "GUARD_ACTION_ANNOTATE"},
        {"cusum": {"drift": 1.0}, "action": "GUARD_ACTION_COUNT"},
    ]
    probes = [{"probe": {"weights": [0.01 * (1 + i)] * subject.width}} for i in range(len(statistics))]
    guards = [
        {"name": f"guard {i}", "score": {"terms": [{"site": site, "row": probe, "weight": 1}]}, "level": 1e9, **fields}
        for i, (probe, fields) in enumerate(zip(probes, statistics, strict=True))
    ]
    policy = json_format.ParseDict({"name": "bench", "version": 1, "guards": guards}, policy_pb2.Policy())
    vector = program_pb2.Vector(name="push", values=[0.01] * subject.width)
    edit = program_pb2.Edit(row=program_pb2.Row(vector=vector), add=1.0)
    policy.program.sites.add(site=site, edits=[edit])
    return policy


async def start_grpc(config: configuration.Config, subject: Subject, load: Load) -> tuple[Generate, Callable[[], None]]:
    """Start a server process, and a Python client of it in this one."""
    # The other sides run without gRPC.
    from rudder.server.process import free_port, server_command
    from rudder_client import AsyncClient

    port = free_port()
    listening = msgspec.structs.replace(config, listen=configuration.Listen(port=port, metrics_port=0))
    settings = subject.folder / "server.yaml"
    settings.write_text(configuration.show(listening))
    server = await asyncio.create_subprocess_exec(*server_command("--config", str(settings)))
    client = AsyncClient(f"127.0.0.1:{port}")
    await client.wait_ready(timeout=600)

    def generate(_case: str, number: int) -> AsyncIterator[Any]:
        stream = client.generate(prompt(load, number), temperature=0.0, max_tokens=load.new_tokens, ignore_eos=True)
        return aiter(stream)

    return generate, server.terminate


def call_of(case: str, number: int, subject: Subject, load: Load, programs: list[Any], watch: Any) -> Call:
    """Build request `number` of a case."""
    more: dict[str, Any] = {}
    if case.endswith("program"):
        more = {"compiled": programs[0]}
    if case.endswith("programs"):
        more = {"compiled": programs[number % len(programs)]}
    if case.startswith("watch"):
        more = {"watch": watch}
    if case.startswith("full_encode"):
        more = {"top_k": 8, "top_k_sites": subject.sae_sites}
    return Call(tuple(prompt(load, number)), sampling(load), **more)


def program_of(subject: Subject, load: Load, number: int) -> program_pb2.Program:
    """Build a program that edits a few latents at the bundle's site and adds a vector at every other site."""
    edits = [
        program_pb2.Edit(
            row=program_pb2.Row(feature=program_pb2.Feature(index=(3 * number + i) % (load.rows // 2))),
            clamp=-1.0 - number / 1024,
        )
        for i in range(PROGRAM_EDITS)
    ]
    vector = program_pb2.Vector(name="push", values=[0.01] * subject.width)
    push = program_pb2.Edit(row=program_pb2.Row(vector=vector), add=1.0 + number)
    first, *others = sorted(subject.sites, key=lambda site: (site != subject.sites[0], parse(site)))
    sites = [program_pb2.SiteEdits(site=first, edits=edits)]
    return program_pb2.Program(sites=[*sites, *(program_pb2.SiteEdits(site=site, edits=[push]) for site in others)])
