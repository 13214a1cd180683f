"""Whatever is done to a log without its key is found, and the first entry that is wrong is named."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rudder.sae_models.errors import UserError
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.verify import Place, Tampered, verify
from tests.unit.server.safety.audit.trails import KEY, call_entry, open_log, written_log

ENTRIES, MAX_BYTES, OTHER_KEY = 30, 1500, bytes(32)
Files = list[list[bytes]]


def read(place: Place) -> Files:
    return [path.read_bytes().splitlines(keepends=True) for path in place.files()]


def write(place: Place, files: Files) -> None:
    for path, content in zip(place.files(), files, strict=True):
        path.write_bytes(b"".join(content))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = written_log(tmp_path_factory.mktemp("audit"), ENTRIES, MAX_BYTES)
    assert len(place.files()) > 3
    return place


@pytest.fixture
def log(original: Place, tmp_path: Path) -> Place:
    """A copy to tamper with."""
    shutil.copytree(original.folder, tmp_path / "log")
    return Place.of(tmp_path / "log")


def test_whole_log_is_verified(original: Place) -> None:
    result = verify(original, KEY)
    assert (result.entries, result.anchored, result.closed, result.torn) == (ENTRIES + 1, ENTRIES + 1, True, False)
    assert result.files == len(original.files())


def forged(files: Files, begin: int) -> Files:
    """Write all lines from `begin` anew with consistent MACs of another key."""
    previous, number, result = chain.ROOT, 0, []
    for content in files:
        result.append(list(content))
        for at, raw in enumerate(content):
            line = chain.parse_line(raw)
            assert line
            if number >= begin:
                line = chain.Line(line.entry, chain.mac_of(OTHER_KEY, previous, line.entry))
                result[-1][at] = line.bytes
            previous, number = line.mac, number + 1
    return result


@st.composite
def tampered(draw: st.DrawFn, files: Files) -> Files:
    """Change, delete, repeat, move, insert, cut, exchange, or compute anew with another key; twice if need be."""
    result = [list(content) for content in files]
    for _ in range(draw(st.integers(1, 2))):
        number = draw(st.integers(0, len(result) - 1))
        content = result[number]
        assume(content)
        at = draw(st.integers(0, len(content) - 1))
        match draw(st.sampled_from(["change", "delete", "repeat", "move", "cut", "files", "empty", "forge"])):
            case "change":
                byte = draw(st.integers(0, len(content[at]) - 1))
                value = bytes([draw(st.integers(0, 255))])
                content[at] = content[at][:byte] + value + content[at][byte + 1 :]
            case "delete":
                del content[at]
            case "repeat":
                content.insert(draw(st.integers(0, len(content))), content[at])
            case "move":
                content.insert(draw(st.integers(0, len(content) - 1)), content.pop(at))
            case "cut":
                del content[at:], result[number + 1 :]
                result += [[] for _ in files[len(result) :]]
            case "files":
                other = draw(st.integers(0, len(result) - 1))
                result[number], result[other] = result[other], result[number]
            case "empty":
                result[number] = []
            case "forge":
                assume(all(chain.parse_line(raw) for content in result for raw in content))
                result = forged(result, draw(st.integers(0, ENTRIES)))
    return result


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tampering_is_found(original: Place, log: Place, data: st.DataObject) -> None:
    files = read(original)
    changed = data.draw(tampered(files))
    assume([b"".join(content) for content in changed] != [b"".join(content) for content in files])
    write(log, changed)
    with pytest.raises(Tampered):
        verify(log, KEY)


def edit(files: Files) -> None:
    files[1][2] = files[1][2].replace(b'"outcome":"OK"', b'"outcome":"ok"')


def delete(files: Files) -> None:
    del files[1][2]


def reorder(files: Files) -> None:
    files[1][2], files[1][3] = files[1][3], files[1][2]


@pytest.mark.parametrize("change", [edit, delete, reorder])
def test_first_wrong_entry_is_named(log: Place, change: Callable[[Files], None]) -> None:
    files = read(log)
    entry = len(files[0]) + 3
    change(files)
    write(log, files)
    with pytest.raises(Tampered, match=f"^{re.escape(str(log.file(2)))}:3: .*entry {entry} "):
        verify(log, KEY)


def test_cut_log_is_found_by_its_head(log: Place) -> None:
    files = read(log)
    del files[-1][-2:]
    write(log, files)
    with pytest.raises(Tampered, match=f"entries {ENTRIES} to {ENTRIES + 1} are missing: the head vouches"):
        verify(log, KEY)


def test_cut_log_with_a_head_of_its_rest_is_found(log: Place) -> None:
    """Whoever can write both files knows all MACs, and not the key."""
    files = read(log)
    last = files[-1][-2]
    del files[-1][-1]
    write(log, files)
    head, line = chain.read_head(log.head), chain.parse_line(last)
    assert head
    assert line
    shorter = msgspec.structs.replace(head, count=ENTRIES, mac=line.mac.hex())
    for made in (shorter, chain.seal_head(OTHER_KEY, shorter)):
        log.head.write_bytes(msgspec.json.encode(made))
        with pytest.raises(Tampered, match="the head was changed, or written without this key"):
            verify(log, KEY)


def test_older_head_of_a_closed_log_is_found(tmp_path: Path) -> None:
    place = written_log(tmp_path / "log", 3)
    closed = place.head.read_bytes()
    log = open_log(tmp_path / "log")
    log.append([call_entry(4)])
    log.close()
    place.head.write_bytes(closed)
    with pytest.raises(Tampered, match="closed with entry 4, but it goes on: the head is an older one"):
        verify(place, KEY)


def test_head_of_another_course_of_the_same_log_is_found(tmp_path: Path) -> None:
    """A server went on from a copy of the log: two logs of one key, with the same first entries and as many of them."""
    written_log(tmp_path / "log", 3)
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    for folder, number in (("log", 4), ("copy", 5)):
        log = open_log(tmp_path / folder)
        log.append([call_entry(number)])
        log.close()
    shutil.copy(tmp_path / "copy" / "head.json", tmp_path / "log")
    with pytest.raises(Tampered, match="entry 5 is not the one that the head vouches for"):
        verify(Place.of(tmp_path / "log"), KEY)


def test_torn_line_before_the_last_file_is_found(log: Place) -> None:
    with log.file(2).open("ab") as file:
        file.write(b'{"kind":"call"')
    with pytest.raises(Tampered, match=r"audit-000002\.jsonl:end: its last line is not whole"):
        verify(log, KEY)


def test_missing_head_and_missing_files_are_found(log: Place) -> None:
    log.files()[1].unlink()
    with pytest.raises(Tampered, match=r"audit-000002\.jsonl: the file is missing"):
        verify(log, KEY)
    for path in log.files():
        path.unlink()
    with pytest.raises(Tampered, match="entries 1 to 31 are missing"):
        verify(log, KEY)
    log.head.unlink()
    with pytest.raises(UserError, match="holds no audit log"):
        verify(log, KEY)


def test_log_without_a_head_is_found(log: Place) -> None:
    log.head.unlink()
    with pytest.raises(Tampered, match="the head is missing"):
        verify(log, KEY)


def test_files_of_another_log_with_the_same_key_are_found(log: Place, tmp_path: Path) -> None:
    other = written_log(tmp_path / "other", ENTRIES, MAX_BYTES)
    shutil.copy(other.file(2), log.file(2))
    with pytest.raises(Tampered, match=r"audit-000002\.jsonl:1: "):
        verify(log, KEY)
    for path in other.files():
        shutil.copy(path, log.folder)
    with pytest.raises(Tampered, match="the log is not the one that the head is of"):
        verify(log, KEY)


def test_running_log_is_verified_up_to_its_last_whole_line(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([call_entry(1), call_entry(2)])
    log.anchor()
    log.append([call_entry(3)])
    log.write(b'{"kind":"call","requ')
    result = verify(log.place, KEY)
    assert (result.entries, result.anchored, result.closed, result.torn) == (4, 3, False, True)


@pytest.mark.parametrize("name", ["audit-000001a.jsonl", "audit-00001.jsonl", "audit-000001_0.jsonl"])
def test_file_of_another_name_is_none_of_the_log(log: Place, name: str) -> None:
    """Whoever can only add files keeps no server from starting."""
    (log.folder / name).write_bytes(b"x")
    assert verify(log, KEY).entries == ENTRIES + 1
    open_log(log.folder).close()


def test_server_does_not_go_on_behind_an_empty_file(log: Place) -> None:
    log.files()[-2].write_bytes(b"")
    with pytest.raises(UserError, match="its last line is not an entry"):
        open_log(log.folder)
