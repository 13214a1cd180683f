"""The HTTP door against vLLM's own OpenAI app, over one engine in one process: what door and service add to a stream.

The engine is Rudder's, idle banks and all, for both; `rudder bench engine` compares engines. Runs alternate; the first
of each is warm-up. A client process opens all streams at once.
"""

import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from prometheus_client import CollectorRegistry
from rich.console import Console
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rudder.server import config as configuration
from rudder.server.engine import selftest
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.http.app import App
from rudder.server.http.listener import Listener
from rudder.server.monitoring.metrics import Metrics
from rudder.server.service.serving import Serving

STOCK, OWN = "vllm", "rudder"


class HttpLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The load: what runs at once, and how often."""

    streams: Annotated[int, Meta(ge=1, description="streams at once")] = 64
    tokens: Annotated[int, Meta(ge=2, description="tokens of each answer")] = 64
    pairs: Annotated[int, Meta(ge=1, description="pairs of runs, without the first")] = 7


class Run(msgspec.Struct, frozen=True):
    """Medians over the streams of a run, in milliseconds: to the first event, and to the end."""

    first_ms: float
    whole_ms: float


class Result(msgspec.Struct, frozen=True):
    """Runs of both in pairs, and the median of the paired ratios, Rudder's to vLLM's."""

    load: HttpLoad
    vllm: Sequence[Run]
    rudder: Sequence[Run]
    first: float
    whole: float


def run(load: HttpLoad, file: Path | None) -> None:
    """Run the benchmark, print it, and write it to a file."""
    result = asyncio.run(compare(load))
    Console().print(
        f"{load.streams} streams of {load.tokens} tokens, medians of {load.pairs} pairs (Rudder / vLLM): to the first"
        f" event {result.first:.3f}, to the end {result.whole:.3f}; to the end"
        f" {statistics.median(r.whole_ms for r in result.rudder):.0f} ms against"
        f" {statistics.median(r.whole_ms for r in result.vllm):.0f} ms"
    )
    if file:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(result)))


async def compare(load: HttpLoad) -> Result:
    """Start one engine behind both apps, and run the load on them in turn."""
    config = configuration.load(overrides={"engine.max_num_seqs": str(load.streams), "engine.enforce_eager": "true"})
    engine = await start_engine(config)
    await selftest.run(engine)
    serving = Serving.around(engine, config, Metrics.create(CollectorRegistry()))
    listeners = {STOCK: Listener(await stock_app(engine, config.engine.model)), OWN: Listener(App(serving))}
    ports = {name: await listener.start("127.0.0.1", 0, None) for name, listener in listeners.items()}
    runs: dict[str, list[Run]] = {STOCK: [], OWN: []}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        for pair in range(load.pairs + 1):
            for name in (STOCK, OWN) if pair % 2 else (OWN, STOCK):
                work = partial(client, ports[name], engine.model.name, load, pair)
                runs[name].append(await asyncio.get_running_loop().run_in_executor(pool, work))
    for listener in listeners.values():
        await listener.stop(1)
    serving.tokenizers.shutdown()
    await engine.stop()
    stock, own = runs[STOCK][1:], runs[OWN][1:]
    pairs = list(zip(stock, own, strict=True))
    first = statistics.median(b.first_ms / a.first_ms for a, b in pairs)
    return Result(load, stock, own, first, statistics.median(b.whole_ms / a.whole_ms for a, b in pairs))


async def stock_app(engine: Engine, model: str) -> Any:
    """Return vLLM's own OpenAI app over an engine."""
    flags = ["--model", model, "--served-model-name", engine.model.name, "--enable-prompt-tokens-details"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    app = build_app(args, ("generate",), engine.llm.model_config)
    await init_app_state(engine.llm, app.state, args, ("generate",))
    return app


def client(port: int, model: str, load: HttpLoad, pair: int) -> Run:
    """Run all streams, in a process of its own."""
    return asyncio.run(all_streams(port, model, load, pair))


async def all_streams(port: int, model: str, load: HttpLoad, pair: int) -> Run:
    """Run all streams at once."""
    streams = (timed(port, model, load, load.streams * pair + number) for number in range(load.streams))
    times = await asyncio.gather(*streams)
    return Run(*(1e3 * statistics.median(values) for values in zip(*times, strict=True)))


async def timed(port: int, model: str, load: HttpLoad, number: int) -> tuple[float, float]:
    """Read one stream; return the seconds to its first event and to its end."""
    prompt = [1, *((7 * number + 13 * i) % 8000 + 2 for i in range(16))]
    fields = {"model": model, "prompt": prompt, "max_tokens": load.tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
    await reader.readuntil(b"data: ")
    first = time.perf_counter() - begin
    rest = await reader.read()
    if b"data: [DONE]" not in rest:
        raise RuntimeError(f"the stream did not end: {rest[-200:]!r}")
    writer.close()
    return first, time.perf_counter() - begin
