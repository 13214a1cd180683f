"""Step 4: decode steps under torch's profiler, of plain vLLM and of Rudder: kernels, and gaps between them.

A slice of Llama 8B with a site at each of its four layers: what Rudder adds to a step, divided by four, is what a site
costs. The cases are idle, and the slowest one that the benchmark has measured.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from vllm.config import ProfilerConfig

from rudder.server.bench import sides
from rudder.server.bench.engine import prepare
from rudder.server.bench.load import Load, Subject
from rudder.server.engine import adapter, selftest
from rudder.server.engine.start import start_engine
from rudder.server.program.layout import Layout
from tests.gpu import trace
from tests.gpu.report import NO_GPU, Figures, Report, arguments

FULL = Load(
    shape="llama-8b-4-layers", requests=256, prompt_tokens=64, new_tokens=96, programs=256, sites=4, latents=4096
)
TINY: dict[str, Any] = {
    "shape": "tiny", "requests": 2, "prompt_tokens": 8, "new_tokens": 24, "programs": 2, "sites": 2, "rows": 160,
    "latents": 1024, "eager": True,
}  # fmt: skip
# Tokens of each request before the profile begins, and during it.
BEFORE, DURING = 8, 10


def slowest_case(folder: Path, load: Load) -> str:
    """Return the case of the benchmark's result with the lowest ratio; that with most programs, where there is none."""
    fallback = f"{load.programs}_programs"
    try:
        steps = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return fallback
    parts = [part for step in steps for part in step["parts"] if step["step"] == "bench"]
    ratios = {part["name"]: part["figures"]["ratio"] for part in parts if "ratio" in part.get("figures", {})}
    return min((case for case in ratios if case in load.all_cases()), key=lambda case: ratios[case], default=fallback)


async def profile(llm: Any, generate: sides.Generate, case: str, load: Load) -> None:
    """Run a load, and profile the worker while all of its requests decode."""
    begun, done = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def read(stream: AsyncIterator[Any]) -> None:
        messages = 0
        async for _ in stream:
            messages += 1
            if messages == BEFORE:
                begun.release()
            if messages == BEFORE + DURING:
                done.release()
        # A stream whose tokens came several at once has fewer messages.
        begun.release()
        done.release()

    tasks = [asyncio.create_task(read(generate(case, number))) for number in range(load.requests)]
    for _ in tasks:
        await begun.acquire()
    await llm.start_profile()
    for _ in tasks:
        await done.acquire()
    await llm.stop_profile()
    await asyncio.gather(*tasks)


@dataclass
class Side:
    """An engine whose worker writes its profiles to a folder. `name`: plain or rudder."""

    name: str
    subject: Subject
    load: Load
    traces: Path
    llm: Any = None
    generate: sides.Generate | None = None

    async def start(self) -> Figures:
        """Start the engine."""
        config = sides.config_of(self.subject, self.load)
        profiler = ProfilerConfig(
            profiler="torch", torch_profiler_dir=str(self.traces), torch_profiler_with_stack=False, ignore_frontend=True
        )
        original = adapter.engine_args
        if self.name == "plain":
            args = sides.plain_args(original(config, Layout(self.subject.sites)))
            self.llm = adapter.start_engine_process(replace(args, profiler_config=profiler), plain=True)
            self.generate = sides.plain_requests(self.llm, self.load)
            return {}
        with patch.object(adapter, "engine_args", lambda *a: replace(original(*a), profiler_config=profiler)):
            engine = await start_engine(config)
        self.llm = engine.llm
        await selftest.run(engine)
        self.generate = sides.rudder_requests(engine, self.subject, self.load)
        return {}

    async def measure(self, case: str) -> dict[str, Any]:
        """Profile a case; return the summary of its trace."""
        assert self.generate is not None
        await profile(self.llm, self.generate, case, self.load)
        return trace.summary(trace.events_in(self.traces))


def headline(summary: dict[str, Any]) -> Figures:
    """Return the figures of a summary without its tables."""
    return {name: value for name, value in summary.items() if not isinstance(value, list)}


def cost_of_a_site(profiles: dict[str, Any], sites: int) -> Figures:
    """Return what each site adds to an idle decode step."""
    plain, ours = profiles["plain: idle"], profiles["rudder: idle"]
    return {name: round((ours[name] - plain[name]) / sites, 2) for name in ("kernels", "busy_us", "idle_us")}


def main() -> int:
    """Run the step."""
    options = arguments(__doc__)
    load = msgspec.structs.replace(FULL, **TINY) if options.tiny else FULL
    cases = list(dict.fromkeys(("idle", slowest_case(options.out.parent, load))))
    suffix = ", tiny on a CPU" if options.tiny else ""
    sides_and_cases = (("plain", cases[:1]), ("rudder", cases))
    planned = [f"{side}: {part}{suffix}" for side, names in sides_and_cases for part in ("start", *names)]
    report = Report(options.out, planned)
    loop = asyncio.new_event_loop()

    def measure(side: Side, case: str) -> Figures:
        summary = report.details[f"{side.name}: {case}"] = loop.run_until_complete(side.measure(case))
        return headline(summary)

    with tempfile.TemporaryDirectory(prefix="rudder-profile-") as folder:
        subject = prepare(Path(folder), load)
        for name, names in sides_and_cases:
            side = Side(name, subject, load, Path(folder) / name)
            begin = partial(loop.run_until_complete, side.start())
            report.run(f"{name}: start{suffix}", begin)
            for case in names if side.generate else ():
                report.run(f"{name}: {case}{suffix}", partial(measure, side, case))
            if side.llm:
                side.llm.shutdown()
    if options.tiny:
        report.not_run("kernels of a decode step, and gaps between them", NO_GPU)
    else:
        report.run("cost of a site", lambda: cost_of_a_site(report.details, load.sites))
    return report.exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
