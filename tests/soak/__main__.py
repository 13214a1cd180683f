"""`make soak`: mixed clients against a server of its own, with the result as JSON. Exit status 1: something grew."""

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path

import msgspec

from rudder.server.failpoints import VARIABLE
from tests.e2e.conftest import running
from tests.soak.soak import soak
from tests.soak.traffic import MAX_MESSAGE_BYTES

# Each call leaves this behind with --leak: the positive control, which must fail.
LEAK_BYTES = 64 << 10
KV_CACHE_BYTES = 64 << 20


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200, help="of traffic (%(default)s)")
    parser.add_argument("--clients", type=int, default=256, help="at once (%(default)s)")
    parser.add_argument("--leak", action="store_true", help="plant a leak, which the soak must find")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args()


def main() -> int:
    """Run the soak."""
    args = parsed()
    flags = {
        "limits.write_timeout_s": "30", "limits.queue": "1024", "limits.max_message_bytes": str(MAX_MESSAGE_BYTES),
        # A large cache would grow for the whole run: its pages are the process's only once they are written.
        "engine.kv_cache_memory_bytes": str(KV_CACHE_BYTES),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if args.leak:
            faults = Path(folder) / "faults.json"
            faults.write_text(json.dumps({"call": {"action": "leak", "bytes": LEAK_BYTES}}))
            os.environ[VARIABLE] = str(faults)
            flags["allow_unsafe"] = "failpoints"
        with running(Path(folder), **flags) as server:
            result = asyncio.run(soak(server.address, server.process.pid, args.seconds, args.clients))
    text = json.dumps({"leak_planted": args.leak, **msgspec.to_builtins(result)}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return int(bool(result.problems))


if __name__ == "__main__":
    raise SystemExit(main())
