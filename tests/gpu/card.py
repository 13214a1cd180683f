"""Run the checks and measurements that need a GPU, each step in a process of its own with its own time limit.

Started by `card.sh`. Under OUT: summary.json, summary.md and logs.tar.gz, and STEP.json of the step that runs. When it
has ended, summary.json holds its content and logs.tar.gz the file: what is carried back from a GPU is few files. They
keep the steps of earlier calls that this one does not run again.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rudder.sae_models.files import write_atomically
from tests.gpu.report import FAILED, NOT_RUN, PASSED, TIMED_OUT

PACKAGE = "tests.gpu"
# For all steps. A rehearsal is no measurement, and may share its cores with others.
SECONDS, TINY_FACTOR = 530.0, 2
# A step with less time than this would only be killed: starting an engine takes longer.
MIN_SECONDS = 25.0
# Steps are killed as one process group; this long the kernel may take to end its last process.
KILL_SECONDS = 10.0
HAS_GPU = "import torch; raise SystemExit(not torch.cuda.is_available())"


@dataclass(frozen=True)
class Step:
    """A module of tests.gpu, its arguments, and the seconds after which it is killed."""

    name: str
    module: str
    seconds: float
    arguments: tuple[str, ...] = ()


# In order of value: what a first call has no time for is NOT RUN, and a second call can name it.
STEPS = (
    # It did not end in the first run on an H200, where nothing was cached.
    Step("startup", "startup", 150, ("auto",)),
    Step("parity", "parity", 190),
    Step("bench", "bench", 270, ("bench",)),
    Step("profile", "profile", 130),
    Step("train", "train", 70),
    Step("sites", "bench", 180, ("sites",)),
    Step("dictionary", "bench", 180, ("dictionary",)),
    # The bank as PyTorch operations, in place of its Triton kernels.
    Step("startup-torch", "startup", 100, ("torch",)),
)
KNOWN = {step.name: step for step in STEPS}


def run_step(step: Step, seconds: float, out: Path, log: Path, tiny: bool) -> dict[str, Any]:
    """Run a step for at most `seconds`; return its result. Its process group is gone afterwards, engines included."""
    report = out / f"{step.name}.json"
    report.unlink(missing_ok=True)
    options = ["--out", str(report), *(["--tiny"] if tiny else [])]
    command = [sys.executable, "-m", f"{PACKAGE}.{step.module}", *options, *step.arguments]
    print(f"{step.name}: at most {seconds:.0f} s", flush=True)
    begin, begun = time.monotonic(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = PASSED if process.wait(seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        finally:
            kill_group(process)
    content = content_of(report)
    if report.exists():
        shutil.move(report, log.with_suffix(".json"))
    end = (
        f"killed after {seconds:.0f} s"
        if status == TIMED_OUT
        else f"exit status {process.returncode}: {last_line(log)}"
    )
    status, reason = verdict(status, content["parts"], end)
    result = {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1), "begun": begun}
    return result | ({"reason": reason} if reason else {}) | {"tiny": tiny} | content


def verdict(status: str, parts: Sequence[Mapping[str, Any]], end: str) -> tuple[str, str]:
    """Return the status of a step and the reason, empty where its parts say it. `end`: how its process ended."""
    found = {part["status"] for part in parts}
    if status == TIMED_OUT:
        return TIMED_OUT, end
    if FAILED in found:
        return FAILED, ""
    if status == FAILED or not parts:
        return FAILED, end
    return (PASSED, "") if PASSED in found else (NOT_RUN, "; ".join(sorted({part["reason"] for part in parts})))


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it has started, and wait until they are gone, but not for one that cannot end.

    A process that waits for a driver ends only when the driver answers.
    """
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        process.poll()
        time.sleep(0.05)
    process.poll()


def content_of(report: Path) -> dict[str, Any]:
    """Return the parts and details that a step has written; none if it wrote none, or died while it wrote."""
    try:
        content: dict[str, Any] = json.loads(report.read_bytes())
    except (OSError, ValueError):
        return {"parts": [], "details": {}}
    return content


def last_line(log: Path) -> str:
    """Return the last line of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def figures_of(figures: Mapping[str, Any]) -> str:
    """Format figures in a line."""
    values = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def lines_of(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return the lines of the table: (step or part, status, seconds, figures or reason)."""
    lines = []
    for result in results:
        text = "; ".join(filter(None, (result.get("begun"), result.get("reason"))))
        lines.append((result["step"], result["status"], f"{result['seconds']:.0f}", text))
        for part in result["parts"]:
            text = part.get("reason", "") or figures_of(part.get("figures", {}))
            seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
            lines.append((f"  {part['name']}", part["status"], seconds, " ".join(text.split())))
    return lines


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the results as text."""
    lines = [("step", "status", "s", "figures"), *lines_of(results)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        " | ".join([*(text.ljust(width) for text, width in zip(line[:3], widths, strict=True)), line[3]]).rstrip()
        for line in lines
    )


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the results as a table in Markdown."""
    lines = [("step", "status", "s", "figures"), ("---", "---", "---", "---"), *lines_of(results)]
    return "".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |\n" for line in lines)


def write_summary(out: Path, logs: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write what is known so far: a card that is killed keeps it."""
    results = list(results)
    write_atomically(out / "summary.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(out / "summary.md", markdown(results).encode())
    with tarfile.open(logs.with_suffix(".tar.gz"), "w:gz", compresslevel=3) as archive:
        archive.add(logs, "logs")
    write_atomically(out / "logs.tar.gz", logs.with_suffix(".tar.gz").read_bytes())


def earlier_results(out: Path, logs: Path, tiny: bool) -> dict[str, dict[str, Any]]:
    """Return the results of earlier calls by step, and unpack their logs. A rehearsal's are not kept beside a GPU's."""
    if not all((out / name).exists() for name in ("summary.json", "logs.tar.gz")):
        return {}
    results = json.loads((out / "summary.json").read_bytes())
    if any(result.get("tiny") != tiny for result in results):
        return {}
    with tarfile.open(out / "logs.tar.gz") as archive:
        archive.extractall(logs.parent, filter="data")
    return {result["step"]: result for result in results}


def not_run(step: Step, reason: str, tiny: bool) -> dict[str, Any]:
    """Return the result of a step that did not run."""
    return {"step": step.name, "status": NOT_RUN, "seconds": 0.0, "reason": reason, "parts": [], "tiny": tiny}


def run_steps(steps: Sequence[Step], seconds: float, out: Path, tiny: bool = False) -> list[dict[str, Any]]:
    """Run steps within `seconds` in all; return their results."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rudder-card-") as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        os.environ["RUDDER_CARD_LOGS"] = str(logs)
        results = earlier_results(out, logs, tiny)
        results |= {step.name: not_run(step, "the card was stopped before it ended", tiny) for step in steps}
        try:
            for step in steps:
                write_summary(out, logs, results.values())
                left = min(step.seconds, begin + seconds - time.monotonic())
                if left < min(MIN_SECONDS, step.seconds):
                    results[step.name] = not_run(
                        step, f"no time left of {seconds:.0f} s: name it in another call", tiny
                    )
                else:
                    results[step.name] = run_step(step, left, out, logs / f"{step.name}.log", tiny)
                    print(table([results[step.name]]), flush=True)
        finally:
            write_summary(out, logs, results.values())
    return [results[step.name] for step in steps]


def obstacle(out: Path, tiny: bool) -> str:
    """Return why the card cannot run here, empty if it can. On a CPU its parts would pass as those of a GPU."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        return f"OUT: {error}"
    if not tiny and subprocess.run([sys.executable, "-c", HAS_GPU], check=False).returncode:
        return "PyTorch finds no GPU; --tiny rehearses on a CPU"
    return ""


def environment() -> dict[str, str]:
    """Return the environment of the steps: no network, and products in float32 as exact as those of the reference."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "TRITON_F32_DEFAULT": "ieee",
        "PYTHONUNBUFFERED": "1",
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/card.sh", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"steps to run (default: all): {' '.join(KNOWN)}")
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU: a rehearsal")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/card")))
    parser.add_argument(
        "--seconds", type=float, help=f"time for all steps (default {SECONDS:.0f}; {TINY_FACTOR} as much with --tiny)"
    )
    options = parser.parse_args(argv)
    options.seconds = options.seconds or SECONDS * (TINY_FACTOR if options.tiny else 1)
    if unknown := [name for name in options.steps if name not in KNOWN]:
        parser.error(f"{unknown[0]!r} is not one of {' '.join(KNOWN)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the card; return 1 if a step failed or was killed, 2 if this machine cannot run it."""
    options = arguments(argv)
    if reason := obstacle(options.out, options.tiny):
        print(f"tests/gpu/card.sh: {reason}", file=sys.stderr)
        return 2
    # Also a card that is told to end kills its step, and keeps what it knows.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    os.environ.update(environment())
    steps = [KNOWN[name] for name in options.steps] or STEPS
    if options.tiny:
        steps = [replace(step, seconds=TINY_FACTOR * step.seconds) for step in steps]
    try:
        results = run_steps(steps, options.seconds, options.out.resolve(), options.tiny)
    except KeyboardInterrupt:
        print(f"stopped; what is known is in {options.out}", file=sys.stderr)
        return 1
    print("\n" + table(results))
    return int(any(result["status"] in (FAILED, TIMED_OUT) for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
