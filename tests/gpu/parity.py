"""Step 2: the engine tests that compare with Transformers and set the known traps, on the device at hand.

On a GPU the tests run side by side, each with engines of its own: most of their time is compilation.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.gpu.report import FAILED, NO_GPU, NOT_RUN, PASSED, Report, arguments
from tests.gpu.stand_in import ensure_bundle

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Selection:
    """Tests that run in one process: files of tests/engine, and pytest's -k."""

    name: str
    files: tuple[str, ...]
    keyword: str = ""

    def command(self, results: Path) -> list[str]:
        """Return the command line; results are written as JUnit XML."""
        paths = [f"tests/engine/{file}" for file in self.files]
        more = ["-k", self.keyword] if self.keyword else []
        # Also those marked long, as some of the compiled ones are.
        options = ["-q", "-p", "no:cacheprovider", "-m", "long or not long", f"--junitxml={results}"]
        return [sys.executable, "-m", "pytest", *options, *more, *paths]


TRAPS = ("test_traps.py", "test_async_scheduling.py")
ON_GPU = (
    Selection("parity: llama, every site", ("test_parity.py",), "llama-compiled"),
    Selection("parity: gemma2, every site", ("test_parity.py",), "gemma2-compiled"),
    Selection("parity: qwen3, every site", ("test_parity.py",), "qwen3-compiled"),
    Selection("traps, overflow, preemption, asynchronous scheduling", TRAPS),
    Selection("policies", ("test_policy.py",)),
)
# What a rehearsal can show is that selections find and run their tests: on a CPU all of them run in `make engine-test`.
TINY = (
    Selection("parity: llama, every site", ("test_parity.py",), "llama-eager"),
    Selection("traps: neighbours, overflow, prefix cache", TRAPS[:1], "unsteered or overflow or shared_across"),
)


def outcome(xml: Path, exit_status: int, log: Path) -> dict[str, object]:
    """Return the status and figures of a selection from its JUnit XML."""
    if not xml.exists():
        return {"status": FAILED, "reason": f"pytest ended with {exit_status}: {log.name}"}
    cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    failed = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    figures = {"tests": len(cases), "failed": len(failed), "skipped": skipped}
    if exit_status or failed or not cases:
        return {
            "status": FAILED,
            "figures": figures,
            "reason": f"{len(failed)} of {len(cases)} failed: {' '.join(failed)}",
        }
    if skipped == len(cases):
        return {"status": NOT_RUN, "figures": figures, "reason": f"all {skipped} are skipped here"}
    return {"status": PASSED, "figures": figures}


def run(selections: tuple[Selection, ...], at_once: int, report: Report, logs: Path) -> None:
    """Run selections, `at_once` at a time, and report each when it ends."""
    waiting, running = list(selections), dict[Selection, tuple[float, "subprocess.Popen[bytes]"]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            selection = waiting.pop(0)
            number = selections.index(selection)
            with (logs / f"parity-{number}.log").open("wb") as log:
                command = selection.command(logs / f"parity-{number}.xml")
                process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            running[selection] = time.monotonic(), process
        time.sleep(0.2)
        for selection, (begin, process) in list(running.items()):
            if process.poll() is not None:
                number = selections.index(selection)
                result = outcome(logs / f"parity-{number}.xml", process.returncode, logs / f"parity-{number}.log")
                report.add(selection.name, seconds=round(time.monotonic() - begin, 1), **result)  # type: ignore[arg-type]
                del running[selection]


def main() -> int:
    """Run the step."""
    options = arguments(__doc__)
    selections = TINY if options.tiny else ON_GPU
    report = Report(options.out, [selection.name for selection in selections])
    ensure_bundle()
    logs = Path(os.environ.get("RUDDER_CARD_LOGS", options.out.parent))
    run(selections, 1 if options.tiny else len(selections), report, logs)
    if options.tiny:
        for selection in ON_GPU:
            report.not_run(f"{selection.name}: V2 runner, full CUDA graphs", NO_GPU)
    return report.exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
