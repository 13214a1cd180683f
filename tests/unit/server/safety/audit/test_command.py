"""`rudder audit`: the key, the status of `verify`, the table of `show`."""

import stat
from pathlib import Path
from typing import Any

import pytest

from rudder.server.cli import main
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog
from rudder.server.safety.audit.verify import Place


def entry(caller: str, policy: str, rule: str) -> dict[str, Any]:
    """An entry as `service.auditing` writes it."""
    return {
        "kind": "call", "time": "2026-01-31T12:00:00.000Z", "caller": caller, "method": "InferenceService.Generate",
        "outcome": "OK", "policies": [{"name": policy, "version": 1, "digest": "d", "mode": "enforce"}],
        "prompt_tokens": 4, "choices": [{
            "finish": "refused", "generated_tokens": 9,
            "verdicts": [{"policy": policy, "rule": rule, "position": 7, "score": 1.5}],
        }],
    }  # fmt: skip


@pytest.fixture
def key(tmp_path: Path) -> Path:
    assert main(["audit", "key", str(tmp_path / "key")]) == 0
    return tmp_path / "key"


@pytest.fixture
def folder(tmp_path: Path, key: Path) -> Path:
    log = AuditLog.open(Place.of(tmp_path / "log"), chain.read_key(key), 1 << 20, "never")
    log.append([entry("anna", "bio", "topic"), entry("ben", "bio", "harm"), entry("ben", "\x1b[31mchem", "topic")])
    log.append([{"kind": "policy", "change": "applied", "policy": {"name": "bio", "version": 2}}])
    log.close()
    return tmp_path / "log"


def test_key_is_private_and_never_printed_or_replaced(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = key.read_text()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert main(["audit", "key", str(key)]) == 2
    output = capsys.readouterr()
    assert text.strip() not in output.out + output.err
    assert key.read_text() == text


def test_status_says_whole_tampered_or_unreadable(folder: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify = ["audit", "verify", str(folder), "--key-file", str(key)]
    assert main(verify) == 0
    assert capsys.readouterr().out.startswith("whole: 5 entries in 1 files, 5 of them vouched for")
    file = Place.of(folder).file(1)
    file.write_bytes(file.read_bytes().replace(b'"ben"', b'"anna"', 1))
    assert main(verify) == 1
    assert f"{file}:3: entry 3 was changed" in capsys.readouterr().err.replace("\n", "")
    assert main(["audit", "verify", str(folder.parent), "--key-file", str(key)]) == 2
    assert main(["audit", "verify", str(folder), "--key-file", str(folder / "none")]) == 2


def test_other_key_is_found(folder: Path, tmp_path: Path) -> None:
    chain.create_key(tmp_path / "other")
    assert main(["audit", "verify", str(folder), "--key-file", str(tmp_path / "other")]) == 1


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        ([], [1, 2, 3, 4, 5]),
        (["--caller", "ben"], [3, 4]),
        (["--policy", "bio"], [2, 3, 5]),
        (["--policy", "bio", "--rule", "topic"], [2]),
        (["--limit", "2"], [1, 2]),
    ],
)
def test_entries_are_shown_by_filter(
    folder: Path, capsys: pytest.CaptureFixture[str], filters: list[str], numbers: list[int]
) -> None:
    assert main(["audit", "show", str(folder), *filters]) == 0
    output = capsys.readouterr().out
    rows = [line.strip("│ ").split("│") for line in output.splitlines() if line.startswith("│")]
    assert [int(row[0]) for row in rows] == numbers
    assert "\x1b[31m" not in output


def test_verdicts_and_tokens_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", "show", str(folder), "--caller", "anna"])
    output = capsys.readouterr().out
    assert "topic@7" in output
    assert "4 + 9" in output
