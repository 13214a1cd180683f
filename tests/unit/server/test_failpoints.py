"""Failpoints do what a test plants, at points that exist, and nothing without it."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rudder.server import failpoints

SERVER = Path(failpoints.__file__).parent


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(failpoints, "FILE", tmp_path / "faults.json")
    monkeypatch.setattr(failpoints, "LEAKED", [])
    return tmp_path / "faults.json"


def plant(file: Path, **fault: Any) -> None:
    file.write_text(json.dumps({"abort": fault}))


def test_without_a_file_nothing_happens() -> None:
    assert failpoints.FILE is None
    assert not failpoints.hit("abort")


async def test_actions(planted: Path) -> None:
    plant(planted, action="error")
    with pytest.raises(failpoints.Planted, match="failpoint abort"):
        failpoints.hit("abort")
    assert not failpoints.hit("call")
    plant(planted, action="enospc")
    with pytest.raises(OSError, match="No space left") as caught:
        await failpoints.pause("abort")
    assert caught.value.errno == errno.ENOSPC
    plant(planted, action="skip")
    assert failpoints.hit("abort")
    plant(planted, action="leak", bytes=100)
    assert not await failpoints.pause("abort")
    assert [len(leaked) for leaked in failpoints.LEAKED] == [100]
    plant(planted, action="delay", seconds=0.001)
    assert not failpoints.hit("abort")
    plant(planted, action="error", share=0)
    assert not failpoints.hit("abort")


def test_a_point_that_does_not_exist_is_an_error(planted: Path) -> None:
    planted.write_text('{"abrot": {"action": "skip"}}')
    with pytest.raises(KeyError, match="abrot"):
        failpoints.hit("abort")


def test_every_point_is_in_the_code_once() -> None:
    sources = "".join(path.read_text() for path in SERVER.rglob("*.py"))
    found = re.findall(r'failpoints\.(?:hit|pause)\("([^"]+)"\)', sources)
    assert sorted(found) == sorted(failpoints.POINTS)
