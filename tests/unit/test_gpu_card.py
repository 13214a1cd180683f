"""The GPU card: a step that hangs, fails or dies costs only itself, and its summary says so."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import bench, card, parity, trace
from tests.gpu.card import Step
from tests.gpu.report import FAILED, NOT_RUN, PASSED, TIMED_OUT, Report
from tests.gpu.stand_in import ensure_bundle

STEP = """
import os, subprocess, sys, time
from pathlib import Path
from tests.gpu.report import Report, arguments

options = arguments(None, "what")
report = Report(options.out)

def part():
    if options.what == "fails":
        raise ValueError("three is not four")
    return {"ratio": 0.9876543, "pairs": 2}

if options.what == "dies":
    sys.exit("no driver")
if options.what == "vanishes":
    report.path.unlink()
    sys.exit()
if options.what == "skips":
    report.not_run("graphs", "needs a GPU")
else:
    report.run("part", part)
if options.what == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    options.out.with_suffix(".pid").write_text(str(child.pid))
    time.sleep(60)
sys.exit(report.exit_status())
"""


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Steps of a module of its own, which do what their name says."""
    folder = tmp_path / "modules" / "card_steps"
    folder.mkdir(parents=True)
    (folder / "step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), str(Path(__file__).parents[2])]))
    monkeypatch.setattr(card, "PACKAGE", "card_steps")
    return [Step(name, "step", 3.0 if name == "hangs" else 30.0, (name,)) for name in NAMES]


NAMES = ("passes", "hangs", "fails", "dies", "skips", "vanishes")


def test_each_step_costs_only_itself(tmp_path: Path, steps: list[Step], capsys: pytest.CaptureFixture[str]) -> None:
    results = {result["step"]: result for result in card.run_steps(steps, 60.0, tmp_path)}
    assert [results[name]["status"] for name in NAMES] == [PASSED, TIMED_OUT, FAILED, FAILED, NOT_RUN, FAILED]
    assert results["hangs"]["parts"][0]["status"] == PASSED, "what it did before it was killed stays"
    assert results["fails"]["parts"][0]["reason"] == "ValueError: three is not four"
    assert "no driver" in results["dies"]["reason"]
    assert results["skips"]["reason"] == "needs a GPU"
    assert results["vanishes"]["reason"] == "exit status 0: no output"
    child = int((tmp_path / "hangs.pid").read_text())
    assert not Path(f"/proc/{child}").exists() or "(zombie)" in Path(f"/proc/{child}/status").read_text()
    assert json.loads((tmp_path / "summary.json").read_bytes())[0]["parts"][0]["figures"]["pairs"] == 2
    assert "| passes | PASSED |" in (tmp_path / "summary.md").read_text()
    assert "ratio 0.9877, pairs 2" in capsys.readouterr().out
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert {f"logs/{name}.log" for name in NAMES} < set(archive.getnames())
        assert "logs/passes.json" in archive.getnames()
    assert {path.name for path in tmp_path.iterdir()} >= {"summary.json", "summary.md", "logs.tar.gz"}
    assert not list(tmp_path.glob("passes*"))


def test_another_call_keeps_what_it_does_not_run_again(tmp_path: Path, steps: list[Step]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    passes, _, fails, _, skips, _ = steps
    card.run_steps([passes, fails], 60.0, out)
    (second,) = card.run_steps([skips], 60.0, out)
    assert second["status"] == NOT_RUN
    kept = {result["step"]: result["status"] for result in json.loads((out / "summary.json").read_bytes())}
    assert kept == {"passes": PASSED, "fails": FAILED, "skips": NOT_RUN}
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert {"logs/passes.log", "logs/fails.json", "logs/skips.log"} < set(archive.getnames())
    card.run_steps([skips], 60.0, out, tiny=True)
    assert [result["step"] for result in json.loads((out / "summary.json").read_bytes())] == ["skips"]


CARD = """
import sys
from pathlib import Path
from tests.gpu import card

card.PACKAGE, card.KNOWN = "card_steps", {name: card.Step(name, "step", 60.0, (name,)) for name in ("passes", "hangs")}
sys.exit(card.main(["--tiny", "--out", sys.argv[1], "passes", "hangs", "passes"]))
"""


@pytest.mark.usefixtures("steps")
def test_a_card_that_is_told_to_end_kills_its_step_and_keeps_what_it_knows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", CARD, str(out)], stderr=subprocess.DEVNULL)
    child = wait_for(out / "hangs.pid")
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 1
    wait_until_gone(child)
    statuses = {result["step"]: result["status"] for result in json.loads((out / "summary.json").read_bytes())}
    assert statuses == {"passes": PASSED, "hangs": NOT_RUN}
    assert card.content_of(out / "hangs.json")["parts"][0]["status"] == PASSED
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert "logs/hangs.log" in archive.getnames()


def wait_for(file: Path) -> int:
    """Wait for a file with a process id."""
    deadline = time.monotonic() + 30.0
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(file.read_text())


def wait_until_gone(process: int) -> None:
    """Wait until a process has ended."""
    status, deadline = Path(f"/proc/{process}/status"), time.monotonic() + 5.0
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_cannot_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that waits for a driver."""
    monkeypatch.setattr(card, "KILL_SECONDS", 0.2)
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True) as process:
        begin = time.monotonic()
        card.kill_group(process)
        taken = time.monotonic() - begin
        process.kill()
    assert taken < 5.0


def test_a_card_without_a_gpu_or_a_folder_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else its parts would pass on the CPU, under the names of those of a GPU."""
    monkeypatch.setattr(card, "HAS_GPU", "raise SystemExit(1)")
    monkeypatch.setattr(card, "run_steps", lambda *_: pytest.fail("it ran"))
    assert card.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert card.main(["--tiny", "--out", str(tmp_path / "file")]) == 2
    assert "OUT: " in capsys.readouterr().err


def test_what_the_time_is_too_short_for_is_not_run(tmp_path: Path, steps: list[Step]) -> None:
    begin = time.monotonic()
    results = card.run_steps([steps[0], steps[0]], 0.5, tmp_path)
    assert {result["status"] for result in results} == {NOT_RUN}
    assert "name it in another call" in results[0]["reason"]
    assert time.monotonic() - begin < 5.0


def test_steps_are_those_of_the_package() -> None:
    folder = Path(card.__file__).parent
    assert all((folder / f"{step.module}.py").exists() for step in card.STEPS)
    assert card.arguments(["bench", "--tiny"]).steps == ["bench"]
    with pytest.raises(SystemExit):
        card.arguments(["benches"])


WITHOUT_GRPC = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("grpc", "grpc_health", "grpc_reflection", "opentelemetry"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_steps_run_without_grpc() -> None:
    """The machine with the GPU has no server's packages, but those of vLLM."""
    names = sorted({f"tests.gpu.{step.module}" for step in card.STEPS} | {"rudder.server.bench.sides"})
    subprocess.run([sys.executable, "-c", WITHOUT_GRPC, *names], check=True, cwd=Path(__file__).parents[2])


def test_benchmark_runs_the_same_cases_in_a_rehearsal() -> None:
    for name in bench.LOADS:
        full, tiny = bench.load_of(name, False), bench.load_of(name, True)
        assert full.all_cases() == full.cases
        assert len(tiny.all_cases()) == len(full.cases)
        assert set(bench.GOALS[name]) <= set(full.cases)
    assert bench.load_of("sites", False).sites == 32


def test_part_of_a_name_is_replaced(tmp_path: Path) -> None:
    report = Report(tmp_path / "step.json")
    report.add("idle", PASSED, figures={"pairs": 1})
    report.not_run("graphs", "needs a GPU")
    report.add("idle", PASSED, figures={"pairs": 2})
    first, second = card.content_of(tmp_path / "step.json")["parts"]
    assert (first["name"], second["name"], first["figures"]) == ("idle", "graphs", {"pairs": 2})


def test_parts_are_not_run_until_they_end(tmp_path: Path) -> None:
    report = Report(tmp_path / "step.json", ["idle", "one program"])
    report.add("idle", PASSED)
    assert [part["status"] for part in card.content_of(tmp_path / "step.json")["parts"]] == [PASSED, NOT_RUN]


def test_a_step_killed_while_it_writes_keeps_the_parts_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.json"
    report = Report(path)
    report.add("idle", PASSED)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        report.add("one program", PASSED)
    assert [part["name"] for part in card.content_of(path)["parts"]] == ["idle"]


JUNIT = """<testsuites><testsuite>
<testcase name="one"/><testcase name="two">{}</testcase><testcase name="three"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_selection_whose_tests_are_all_skipped_is_not_run(tmp_path: Path) -> None:
    xml = tmp_path / "results.xml"
    xml.write_text('<testsuites><testsuite><testcase name="one"><skipped/></testcase></testsuite></testsuites>')
    result = parity.outcome(xml, 0, tmp_path / "log")
    assert result["status"] == NOT_RUN
    assert "skipped" in str(result["reason"])


@pytest.mark.parametrize(("inner", "status"), [("", PASSED), ("<failure/>", FAILED), ("<error/>", FAILED)])
def test_outcome_of_a_selection_is_read_from_its_results(tmp_path: Path, inner: str, status: str) -> None:
    xml = tmp_path / "results.xml"
    xml.write_text(JUNIT.format(inner))
    result = parity.outcome(xml, int(status == FAILED), tmp_path / "log")
    assert result["status"] == status
    assert result["figures"] == {"tests": 3, "failed": int(status == FAILED), "skipped": 1}
    assert ("two" in str(result.get("reason"))) == (status == FAILED)
    xml.unlink()
    assert parity.outcome(xml, 4, tmp_path / "log")["status"] == FAILED


def kernel(name: str, start: float, duration: float) -> dict[str, Any]:
    """An event of a kernel, in microseconds."""
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration}


def test_trace_is_summed_a_step_with_the_gaps_between_kernels() -> None:
    step = {"cat": "user_annotation", "name": "execute_context_0(0)_generation_2(2)", "ts": 0.0, "dur": 50.0}
    # The second kernel ends within the first; the GPU is idle from 10 to 14 and from 24 to 25.
    events = [step, step, kernel("gemm", 0.0, 10.0), kernel("copy", 2.0, 3.0), kernel("gemm", 14.0, 10.0)]
    events += [kernel("norm", 25.0, 5.0), {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 1.0}, {"ph": "M"}]
    summary = trace.summary(events)
    assert (summary["steps"], summary["kernels"]) == (2, 2.0)
    assert (summary["busy_us"], summary["idle_us"], summary["gaps"]) == (12.5, 2.5, 1.0)
    assert summary["longest"][0] == {"us": 4.0, "after": "gemm", "before": "gemm"}
    assert summary["table"][0] == {"name": "gemm", "calls": 1.0, "us": 10.0}
    with pytest.raises(ValueError, match="no step"):
        trace.summary(events[2:])


def test_shipped_bundle_is_not_replaced(tmp_path: Path) -> None:
    assert not ensure_bundle()
    assert ensure_bundle(tmp_path / "bundle")
    assert not ensure_bundle(tmp_path / "bundle")
