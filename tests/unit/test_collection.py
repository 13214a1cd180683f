"""Every process collects the same tests: xdist refuses to run when two of them differ.

No test id or parameter may depend on the time, on memory addresses, on hashes or on an order that they decide.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Prints each test with the value of its parameters. Functions and classes are their names; of any other object it takes
# the type, for its representation may hold an address.
PLUGIN = """
import hashlib, os, time

now, now_ns, shift = time.time, time.time_ns, int(os.environ["SHIFT_S"])
time.time, time.time_ns = (lambda: now() + shift), (lambda: now_ns() + shift * 10**9)

def text_of(value):
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{text_of(k)}: {text_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "set of " + ", ".join(sorted(map(text_of, value)))
    return getattr(value, "__qualname__", type(value).__qualname__)

def pytest_collection_finish(session):
    with open(os.environ["COLLECTED"], "w") as file:
        for item in session.items:
            params = getattr(item, "callspec", None)
            digest = hashlib.sha256(text_of(params.params if params else {}).encode()).hexdigest()[:16]
            print(item.nodeid, digest, file=file)
"""


def collecting(folder: Path, number: int, *paths: str) -> "subprocess.Popen[bytes]":
    """Collect tests in a process that has hashes and a day of its own; they are in `folder`/NUMBER."""
    (folder / "print_collected.py").write_text(PLUGIN)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "PYTHONHASHSEED": str(number + 1), "SHIFT_S": str(90_000 * number), "COLLECTED": str(folder / str(number)),
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-qq",
        "-p",
        "no:cacheprovider",
        "-p",
        "print_collected",
    ]
    return subprocess.Popen([*command, *paths], cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=os.environ | environment)


def differences(folder: Path, *paths: str) -> list[tuple[str, str]]:
    """Collect twice at the same time, and return the tests that differ."""
    processes = [collecting(folder, number, *paths) for number in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    first, second = ((folder / str(number)).read_text().splitlines() for number in range(2))
    assert len(first) == len(second) > 0
    return [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]


# Each run of xdist compares the test ids of two processes; this compares parameters, too.
@pytest.mark.long
def test_all_processes_collect_the_same_tests(tmp_path: Path) -> None:
    assert differences(tmp_path, "tests/unit", "tests/engine", "tests/e2e") == []


def test_what_depends_on_the_process_is_seen(tmp_path: Path) -> None:
    letters = "list({'a', 'b', 'c', 'd', 'e', 'f'})"
    planted = ("gzip.compress(b'x')", "str(time.time())", "hash('x')", "str(object())", letters, "'the same'")
    tests = (f"@pytest.mark.parametrize('p', [{p}])\ndef test_{i}(p): pass\n" for i, p in enumerate(planted))
    (tmp_path / "test_planted.py").write_text("import gzip, time, pytest\n" + "".join(tests))
    assert len(differences(tmp_path, str(tmp_path / "test_planted.py"))) == len(planted) - 1
