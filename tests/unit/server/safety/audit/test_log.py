"""The files of a log: rotation, what a crash leaves, a full disk, one writer."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from rudder.sae_models.errors import UserError
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.verify import Place, lines, verify
from tests.unit.disk import full_beyond
from tests.unit.server.safety.audit.trails import KEY, call_entry, open_log, written_log


def entries(place: Place) -> list[dict[str, object]]:
    return [entry for line in lines(place) if (entry := chain.entry_of(line))]


def test_lines_are_json_of_the_entry_and_its_mac(tmp_path: Path) -> None:
    place = written_log(tmp_path, 1)
    first, second = place.file(1).read_text().splitlines()
    assert json.loads(first).keys() == {"kind", "time", "chain", "sequence", "mac"}
    body = json.loads(second)
    mac = body.pop("mac")
    assert body == {**call_entry(0), "sequence": 2}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    assert mac == chain.mac_of(KEY, bytes.fromhex(json.loads(first)["mac"]), canonical).hex()


def test_chain_goes_on_over_files_and_starts(tmp_path: Path) -> None:
    for _ in range(3):
        log = open_log(tmp_path, max_bytes=1000)
        for number in range(10):
            log.append([call_entry(number)])
        log.close()
    result = verify(Place.of(tmp_path), KEY)
    assert (result.entries, result.closed) == (31, True)
    assert result.files > 5
    assert all(1000 <= path.stat().st_size < 1400 for path in Place.of(tmp_path).files()[:-1])


def test_files_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    place = written_log(tmp_path / "log", 20, max_bytes=1000)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (place.folder, place.head, *place.files())]
    assert modes == [0o700, *(0o600,) * (len(modes) - 1)]


def test_torn_line_is_kept_aside_and_the_chain_says_so(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([call_entry(1)])
    log.anchor()
    torn = b'{"caller":"anna","kind":"call","requ'
    log.write(torn)
    log.lock.close()
    again = open_log(tmp_path)
    again.append([call_entry(2)])
    again.close()
    (kept,) = tmp_path.glob("torn-*")
    assert kept.read_bytes() == torn
    recovered = entries(again.place)[2]
    assert recovered.items() >= {
        "kind": "recovered", "bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest(), "kept": kept.name,
    }.items()  # fmt: skip
    assert verify(again.place, KEY).entries == 4


@pytest.mark.parametrize("whole", [True, False])
def test_first_line_may_be_torn(tmp_path: Path, whole: bool) -> None:
    """The server was killed as it began the log: with its head, and nothing or half of a line."""
    log = open_log(tmp_path)
    log.lock.close()
    head = chain.read_head(log.place.head)
    assert head
    begun = chain.Head(chain=head.chain, count=0, mac=chain.ROOT.hex(), closed=False)
    log.place.head.write_bytes(msgspec.json.encode(chain.seal_head(KEY, begun)))
    log.place.file(1).write_bytes(b"" if whole else b'{"chain":"')
    open_log(tmp_path).close()
    kinds = [entry["kind"] for entry in entries(log.place)]
    assert kinds == (["begin"] if whole else ["begin", "recovered"])
    verify(log.place, KEY)


KILLED = """
import itertools, sys
from pathlib import Path
from tests.unit.server.safety.audit.trails import call_entry, open_log
log = open_log(Path(sys.argv[1]), max_bytes=100_000)
for number in itertools.count():
    log.append([call_entry(number)])
    if number % 50 == 0:
        log.anchor()
    if number == 500:
        print("half", flush=True)
"""


def test_killed_writer_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    before = verify(Place.of(tmp_path), KEY)
    assert before.entries > 500
    log = open_log(tmp_path)
    log.append([call_entry(1)])
    log.close()
    assert verify(log.place, KEY).entries == before.entries + 1 + before.torn


def test_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([call_entry(1)])
    size = log.place.file(1).stat().st_size
    with full_beyond(size + 100), pytest.raises(OSError, match="File too large"):
        log.append([call_entry(2)])
    assert log.place.file(1).stat().st_size == size
    log.append([call_entry(3)])
    log.close()
    assert [entry.get("generated_tokens") for entry in entries(log.place)] == [None, 1, 3]
    verify(log.place, KEY)


def test_nothing_is_appended_after_a_failed_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path, fsync="always")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            log.append([call_entry(1)])
    with pytest.raises(OSError, match="only a restart"):
        log.append([call_entry(2)])
    head = log.place.head.read_bytes()
    with pytest.raises(OSError, match="only a restart"):
        log.close()
    assert log.place.head.read_bytes() == head
    open_log(tmp_path).close()
    assert verify(log.place, KEY).entries == 2


def test_second_writer_is_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(UserError, match=r"^audit\.folder: .*another process writes"):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


def test_log_that_was_tampered_with_is_not_continued(tmp_path: Path) -> None:
    place = written_log(tmp_path, 10)
    content = place.file(1).read_bytes().splitlines(keepends=True)
    place.file(1).write_bytes(b"".join(content[:-1]))
    before = place.head.read_bytes()
    with pytest.raises(UserError, match="entry 11 is missing: the head vouches for 11; see `rudder audit verify"):
        open_log(tmp_path)
    assert place.head.read_bytes() == before


def test_first_line_of_a_file_follows_the_file_before(tmp_path: Path) -> None:
    """The start verifies the last file alone: also where it begins."""
    place = written_log(tmp_path, 20, max_bytes=1000)
    last = place.files()[-1]
    last.write_bytes(b"".join(last.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=rf"{last.name}:1: holds entry"):
        open_log(tmp_path)


def test_key_is_created_once_and_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    chain.create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(chain.read_key(path)) == 32
    with pytest.raises(UserError, match="exists already"):
        chain.create_key(path)
    path.chmod(0o644)
    with pytest.raises(UserError, match="others may read or write the key"):
        chain.read_key(path)


@pytest.mark.parametrize("text", ["", "00" * 31, "no key", "0" * 65])
def test_file_that_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(UserError, match="is not a key: 64 or more hexadecimal digits"):
        chain.read_key(tmp_path / "key")
