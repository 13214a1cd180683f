"""`make fuzz`: both layers of the fuzzer, with the result as JSON. Exit status 1: something crashed or is held."""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.e2e.conftest import running
from tests.fuzz import process, wire
from tests.fuzz.cases import corpus, drawn, line_of
from tests.fuzz.process import Result

PROGRESS = 50_000


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=50_000, help="drawn cases in the process (%(default)s)")
    parser.add_argument("--wire", type=int, default=2_000, help="drawn cases on the wire (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the drawn cases (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args()


def report(result: Result) -> dict[str, Any]:
    """Return a result for JSON."""
    return {
        "messages": result.messages,
        "seconds": round(result.seconds, 1),
        "slowest_s": round(result.slowest_s, 3),
        "outcomes": dict(result.outcomes.most_common()),
        "crashes": [line_of(case) for case in result.crashes],
        "held": result.held,
        "passed": result.passed,
    }


def note(messages: int) -> None:
    """Say how far a run is."""
    if messages % PROGRESS == 0:
        print(f"{messages} messages", file=sys.stderr, flush=True)


def main() -> int:
    """Run what was asked for."""
    args = parsed()
    # A line for each call would be most of the work.
    logging.getLogger("rudder").setLevel(logging.CRITICAL)
    serving = process.serving_without_engine()
    known = process.known_values(serving)
    results: dict[str, Any] = {"seed": args.seed, "corpus": len(corpus())}
    if args.messages:
        results["process"] = report(asyncio.run(process.run(serving, drawn(args.seed, args.messages, known), note)))
    if args.wire:
        with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
            results["wire"] = report(asyncio.run(wire.run(server.address, drawn(args.seed + 1, args.wire, known))))
    text = json.dumps(results, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return int(not all(results[layer]["passed"] for layer in ("process", "wire") if layer in results))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # The tokenizer's threads need no end.
    os._exit(status)
