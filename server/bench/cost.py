"""Last step of the tour: tokens a second of a running server beside plain vLLM, alternating in one run.

python -m rudder.server.bench.cost ADDRESS [--section.field=VALUE ...]

The fields are those of the server's configuration, so that both serve the same model in the same way.
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from rudder.server import config as configuration
from rudder.server.bench.load import Load
from rudder_client import AsyncClient, Report
from rudder_client.tour import INDENT, title

LOAD = Load(requests=16, prompt_tokens=32, new_tokens=24, pairs=3)
PLAIN, PROGRAM = "plain vLLM", "more-astronomy"
# What a request asks of the server, by the name of the line.
ASKED: dict[str, dict[str, Any]] = {
    "Rudder": {},
    "with a program": {"steer": PROGRAM},
    "with strongest features": {"report": Report(top_k=8)},
}
Stream = Callable[[int], AsyncIterator[Any]]


def main() -> None:
    """Print tokens a second of each case, and the ratio to plain vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    address, *flags = sys.argv[1:]
    fields = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    title(
        f"6. Cost: tokens a second for {LOAD.requests} streams at once, beside plain vLLM",
        "The same requests by turns to a plain vLLM engine, started for this step, and to this server through gRPC."
        " A ratio near 1 says that steering and watching cost little. A busy machine makes all of them slow.",
    )
    print_table(asyncio.run(measure(address, configuration.load(None, fields))))


async def measure(address: str, config: configuration.Config) -> dict[str, list[float]]:
    """Return tokens a second of each case, one figure a round; the first round warms up and is left out."""
    # vLLM takes its logging level from the environment when it is imported.
    from rudder.server.bench import sides
    from rudder.server.engine.adapter import engine_args, start_engine_process
    from rudder.server.program.layout import Layout

    llm = start_engine_process(sides.plain_args(engine_args(config, Layout(("layers.0.resid_post",)))), plain=True)
    plain = sides.plain_requests(llm, LOAD)
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": LOAD.new_tokens, "ignore_eos": True}
    rounds: list[dict[str, float]] = []
    async with AsyncClient(address) as client:

        def served(asked: dict[str, Any]) -> Stream:
            return lambda number: aiter(client.generate(sides.prompt(LOAD, number), **asked, **sampling))

        cases: dict[str, Stream] = {PLAIN: lambda number: plain("", number)}
        cases |= {name: served(asked) for name, asked in ASKED.items()}
        for number in range(LOAD.pairs + 1):
            begin = number * len(cases) * LOAD.requests
            rounds.append(
                {
                    name: await tokens_per_second(stream, begin + place * LOAD.requests, sides.drain)
                    for place, (name, stream) in enumerate(cases.items())
                }
            )
    llm.shutdown()
    return {name: [figures[name] for figures in rounds[1:]] for name in cases}


async def tokens_per_second(stream: Stream, first: int, drain: Callable[[Any], Any]) -> float:
    """Run the load once; `first`: number of its first prompt, since no two runs share a prompt."""
    begin = time.perf_counter()
    await asyncio.gather(*(drain(stream(first + number)) for number in range(LOAD.requests)))
    return LOAD.requests * LOAD.new_tokens / (time.perf_counter() - begin)


def print_table(figures: dict[str, list[float]]) -> None:
    """Print the median of each case, and the median of the rounds' ratios to plain vLLM."""
    for name, speeds in figures.items():
        ratios = [speed / plain for speed, plain in zip(speeds, figures[PLAIN], strict=True)]
        ratio = "" if name == PLAIN else f"   {statistics.median(ratios):.2f} of it"
        print(f"{name:>{INDENT}}: {statistics.median(speeds):6.0f}{ratio}")


if __name__ == "__main__":
    main()
