"""Step 1: an engine starts, its self-test passes, and each token of a steered stream is the reference arithmetic's."""

import asyncio
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch

from rudder.server import config as configuration
from rudder.server.engine import adapter, selftest, supported
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.program.compile import compile_program
from rudder.v1 import program_pb2 as pb
from tests.gpu.report import NO_GPU, Figures, Report, arguments
from tests.gpu.stand_in import SITE, ensure_bundle

PROMPT_TOKENS, NEW_TOKENS = 40, 48
CACHE_BYTES = 1 << 28
WATCHED_WORKER = "tests.gpu.worker_watched.Worker"
WAITS = "no step waits for the device"
GRAPHS = "CUDA graphs, V2 runner"
PARTS = ("environment", "start", "self-test", "steered stream", GRAPHS, WAITS)


def environment() -> Figures:
    """Return the versions and the device."""
    packages = {name: version(name) for name in ("transformers", "protobuf", "numpy")}
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": adapter.VLLM_VERSION,
        **packages,
    }
    if not torch.cuda.is_available():
        return figures
    properties = torch.cuda.get_device_properties(0)
    return figures | {
        "triton": version("triton"),
        "cuda": str(torch.version.cuda),
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def config_of(tiny: bool, backend: str) -> configuration.Config:
    """Configure the shipped model with a site of each kind, compiled and with CUDA graphs unless `tiny`."""
    overrides = {
        "engine.bank_backend": backend,
        "engine.sites": "[layers.1.mlp_out, layers.3.resid_mid, layers.4.resid_post]",
        "engine.max_model_len": "512",
        "engine.max_num_seqs": "16",
        "engine.max_num_batched_tokens": "128",
        "engine.kv_cache_memory_bytes": str(CACHE_BYTES),
        "engine.rows": "32",
        "engine.slots": "16",
        "engine.enforce_eager": str(tiny).lower(),
        "programs.folder": "null",
    }
    return configuration.load(None, overrides | ({"engine.gpu_memory_utilization": "0.1"} if not tiny else {}))


def graphs(engine: Engine) -> Figures:
    """Require the V2 runner, full CUDA graphs for decode steps and asynchronous scheduling; return the settings."""
    resolved: Any = engine.llm.vllm_config
    mode = resolved.compilation_config.cudagraph_mode
    figures = {
        "v2_runner": resolved.use_v2_model_runner,
        "cudagraph_mode": mode.name,
        "captured_sizes": len(resolved.compilation_config.cudagraph_capture_sizes or ()),
        "steps_in_flight": resolved.max_concurrent_batches,
    }
    if not (figures["v2_runner"] and "FULL" in mode.name and figures["steps_in_flight"] == 2):
        raise AssertionError(f"not as vLLM's default on a GPU: {figures}")
    return figures


@contextmanager
def watched_worker() -> Iterator[None]:
    """Within this context, engines start with a worker that notes where its steps wait for the device."""
    args = adapter.engine_args
    checks = tuple(check for check in supported.CHECKS if check[0] != "parallel_config.worker_cls")
    with (
        patch.object(adapter, "engine_args", lambda *a: replace(args(*a), worker_cls=WATCHED_WORKER)),
        patch.object(supported, "CHECKS", checks),
    ):
        yield


async def waits(engine: Engine) -> Figures:
    """Require that no step waits for the device in all that a site's self-test and a steered stream do."""
    await engine.llm.collective_rpc("rudder_watch")
    await selftest.check_site(engine, engine.registry.layout.sites.index(SITE), SITE, 0)
    await steered_stream(engine)
    places = sorted({place for places in await engine.llm.collective_rpc("rudder_waits") for place in places})
    if places:
        raise AssertionError(f"the host waits for the device at {', '.join(places)}")
    return {}


async def steered_stream(engine: Engine) -> Figures:
    """Compare every token that a program edited in a stream with the formula in plain PyTorch."""
    number = engine.registry.layout.sites.index(SITE)
    bundle = next(iter(engine.registry.dictionaries))
    feature = pb.Edit(row=selftest.feature_row(bundle, 7), add=0.5, unit=pb.UNIT_RESIDUAL_NORM)
    push = selftest.edit_of(selftest.canary_vector(engine, 0), 2.0)
    program = pb.Program(sites=[pb.SiteEdits(site=SITE, edits=[push, feature])])
    compiled = compile_program(program, engine.registry, field="card")
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    plain = Call(selftest.prompt_of(engine, PROMPT_TOKENS), sampling, capture=True)
    steered, untouched = await selftest.run_together(engine, [replace(plain, compiled=compiled), plain])
    width = engine.model.hidden_size
    before, after = selftest.residuals(steered, number, width)
    expected = selftest.reference(engine, compiled.sites[0], before, torch.ones(len(before), dtype=torch.bool))
    selftest.require_close(
        SITE, "each token of a stream is edited as the reference", after, expected, selftest.TOLERANCE
    )
    selftest.require_close(SITE, "its neighbour is untouched", *selftest.residuals(untouched, number, width), 0.0)
    tokens = PROMPT_TOKENS + NEW_TOKENS - 1
    if steered.outcome.moved != (tokens, tokens):
        raise AssertionError(f"{steered.outcome.moved} tokens edited, not {tokens}")
    error = float((after - expected).abs().max() / expected.abs().max())
    return {"tokens": tokens, "largest_error": error, "moved": float((after - before).norm() / before.norm())}


def main() -> int:
    """Run the step."""
    options = arguments(__doc__, "backend")
    report = Report(options.out, PARTS)
    report.run("environment", environment)
    loop = asyncio.new_event_loop()
    engines: list[Engine] = []

    def start() -> Figures:
        stand_in = ensure_bundle()
        with nullcontext() if options.tiny else watched_worker():
            engines.append(loop.run_until_complete(start_engine(config_of(options.tiny, options.backend))))
        return {"sites": len(engines[0].registry.layout.sites), "bundle": "random" if stand_in else "shipped"}

    def with_engine(part: Callable[[Engine], Any]) -> Callable[[], Figures]:
        return lambda: loop.run_until_complete(part(engines[0])) or {}

    report.run("start", start)
    parts = {"self-test": selftest.run, "steered stream": steered_stream}
    for name, part in parts.items() if engines else ():
        report.run(name, with_engine(part))
    if options.tiny:
        report.not_run(GRAPHS, NO_GPU)
        report.not_run(WAITS, NO_GPU)
    elif engines:
        report.run(GRAPHS, lambda: graphs(engines[0]))
        report.run(WAITS, with_engine(waits))
    for engine in engines:
        loop.run_until_complete(engine.stop())
    return report.exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
