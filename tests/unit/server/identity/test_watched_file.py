"""Files that change: the new content is in force soon, and a broken one leaves the last good one."""

from pathlib import Path

import pytest

from rudder.server.identity import watched_file
from rudder.server.identity.watched_file import WatchedFile


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[WatchedFile[int], Path, list[str]]:
    monkeypatch.setattr(watched_file, "CHECK_S", 0.0)
    path, failed = tmp_path / "number", list[str]()
    path.write_text("1")
    return WatchedFile("numbers", (path,), int, failed.append), path, failed


def test_changed_file_is_read(watched: tuple[WatchedFile[int], Path, list[str]]) -> None:
    file, path, failed = watched
    assert file.current() == 1
    path.write_text("22")
    assert (file.current(), failed) == (22, [])


@pytest.mark.parametrize("broken", ["no number", None])
def test_broken_file_leaves_the_last_good_content(
    watched: tuple[WatchedFile[int], Path, list[str]], broken: str | None
) -> None:
    file, path, failed = watched
    path.unlink() if broken is None else path.write_text(broken)
    assert (file.current(), failed) == (1, ["numbers"])
    path.write_text("333")
    assert file.current() == 333


def test_first_reading_must_succeed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        WatchedFile("numbers", (tmp_path / "missing",), int, print)
