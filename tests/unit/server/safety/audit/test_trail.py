"""The audit log of a running server: what waits for it, what it does when it cannot be written, and what is lost."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from rudder.sae_models.errors import UserError
from rudder.server.config import Audit, ConfigError
from rudder.server.monitoring.metrics import Metrics
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog
from rudder.server.safety.audit.trail import AuditFailed, Trail, open_trail
from rudder.server.safety.audit.verify import lines, verify
from tests.unit.disk import full_beyond
from tests.unit.server.safety.audit.trails import call_entry, settings

Open = Callable[..., Trail]


class Rig:
    """Trails of one folder, closed at the end of the test, and their registry."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.registry = folder, CollectorRegistry()
        self.metrics, self.trails = Metrics.create(self.registry), list[Trail]()

    def open(self, **fields: Any) -> Trail:
        trail = open_trail(settings(self.folder, **fields), self.metrics)
        assert trail
        self.trails.append(trail)
        return trail

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0

    def entries(self, trail: Trail) -> list[dict[str, Any]]:
        return [entry for line in lines(trail.log.place) if (entry := chain.entry_of(line))]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    for trail in made.trails:
        if trail.thread.is_alive():
            trail.close()


def key_of(trail: Trail) -> bytes:
    return trail.log.key


def test_without_a_folder_there_is_no_log() -> None:
    assert open_trail(Audit(), Metrics.create()) is None


def test_key_must_be_named_and_lie_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with pytest.raises(ConfigError, match=r"^audit\.key_file: is null"):
        open_trail(Audit(folder=str(folder)), Metrics.create())
    folder.mkdir()
    chain.create_key(folder / "key")
    with pytest.raises(ConfigError, match=r"^audit\.key_file: is in the folder of the log"):
        open_trail(Audit(folder=str(folder), key_file=str(folder / "key")), Metrics.create())
    with pytest.raises(UserError, match="there is no such key file"):
        open_trail(Audit(folder=str(folder), key_file=str(folder / "other")), Metrics.create())


async def test_entries_are_written_in_order_with_their_time(rig: Rig) -> None:
    trail = rig.open()
    for number in range(50):
        await trail.append(call_entry(number))
    trail.close()
    entries = rig.entries(trail)
    assert [entry.get("generated_tokens") for entry in entries] == [None, *range(50)]
    times = [str(entry["time"]) for entry in entries[1:]]
    assert times == sorted(times)
    assert all(text.endswith("Z") for text in times)
    assert verify(trail.log.place, key_of(trail)).closed
    assert rig.value("rudder_audit_records_total", outcome="written") == 50


async def test_always_means_on_disk_before_the_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised = list[int]()
    fsync = os.fsync
    trail = rig.open(fsync="always")

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        synchronised.append(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    await trail.append(call_entry(1))
    assert trail.log.descriptor in synchronised


async def test_entries_that_wait_together_share_an_fsync(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    trail, count = rig.open(fsync="always"), 0
    synchronise = trail.log.synchronise

    def slow() -> None:
        nonlocal count
        count += 1
        time.sleep(0.05)
        synchronise()

    monkeypatch.setattr(trail.log, "synchronise", slow)
    await asyncio.gather(*(trail.append(call_entry(number)) for number in range(200)))
    assert count < 10


async def test_slow_disk_does_not_block_the_event_loop(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    trail, append, release = rig.open(), AuditLog.append, threading.Event()

    def slow(*args: Any) -> list[bytes]:
        release.wait(10)
        return append(*args)

    monkeypatch.setattr(AuditLog, "append", slow)
    waiting = asyncio.create_task(trail.append(call_entry(1)))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not waiting.done()
    release.set()
    await waiting


async def test_without_fsync_and_open_no_call_waits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    trail, append, release = rig.open(on_failure="open"), AuditLog.append, threading.Event()
    monkeypatch.setattr(AuditLog, "append", lambda *args: (release.wait(10), append(*args))[1])
    await asyncio.wait_for(trail.append(call_entry(1)), 1)
    release.set()


async def test_closed_on_a_full_disk_fails_calls_until_there_is_room_again(rig: Rig) -> None:
    trail = rig.open()
    await trail.append(call_entry(1))
    with full_beyond(trail.log.place.file(1).stat().st_size):
        with pytest.raises(AuditFailed):
            await trail.append(call_entry(2))
        with pytest.raises(AuditFailed):
            trail.require_open()
        assert rig.value("rudder_audit_failing") == 1
    await until(lambda: not trail.failing)
    trail.require_open()
    await trail.append(call_entry(3))
    assert [(e["kind"], e.get("entries", e.get("generated_tokens"))) for e in rig.entries(trail)[1:]] == [
        ("call", 1), ("lost", 1), ("call", 3),
    ]  # fmt: skip
    assert rig.value("rudder_audit_records_total", outcome="lost") == 1
    assert rig.value("rudder_audit_failing") == 0


async def test_open_on_a_full_disk_serves_and_counts(rig: Rig) -> None:
    trail = rig.open(on_failure="open", fsync="always")
    with full_beyond(trail.log.place.file(1).stat().st_size):
        await trail.append(call_entry(1))
        trail.require_open()
        await trail.append(call_entry(2))
    await trail.append(call_entry(3))
    assert [(e["kind"], e.get("entries")) for e in rig.entries(trail)[1:]] == [("lost", 2), ("call", None)]
    assert rig.value("rudder_audit_records_total", outcome="lost") == 2


async def test_full_queue_loses_entries_and_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    trail, append, release = rig.open(queue=2), AuditLog.append, threading.Event()
    monkeypatch.setattr(AuditLog, "append", lambda *args: (release.wait(10), append(*args))[1])
    waiting = [trail.submit(call_entry(0))]
    await until(trail.queue.empty)
    waiting += [trail.submit(call_entry(number)) for number in (1, 2, 3, 4)]
    with pytest.raises(AuditFailed):
        await trail.append(call_entry(5))
    release.set()
    await until(trail.queue.empty)
    await trail.append(call_entry(6))
    assert [written.result() for written in waiting] == [True, True, True, False, False]
    entries = [(e["kind"], e.get("entries", e.get("generated_tokens"))) for e in rig.entries(trail)[1:]]
    assert entries == [("call", 0), ("lost", 3), ("call", 1), ("call", 2), ("call", 6)]


async def test_cancelled_call_leaves_its_entry(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    trail, append, release = rig.open(), AuditLog.append, threading.Event()
    monkeypatch.setattr(AuditLog, "append", lambda *args: (release.wait(10), append(*args))[1])
    waiting = asyncio.create_task(trail.append(call_entry(1)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    release.set()
    await trail.append(call_entry(2))
    assert [entry.get("generated_tokens") for entry in rig.entries(trail)[1:]] == [1, 2]


async def test_fault_of_the_writer_fails_its_calls_and_no_later_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    trail = rig.open()

    def fault(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(AuditLog, "append", fault)
        with pytest.raises(AuditFailed):
            await asyncio.wait_for(trail.append(call_entry(1)), 5)
    await trail.append(call_entry(2))


@pytest.mark.parametrize("fields", [{"anchor_every": 3}, {}])
async def test_head_follows_the_log(rig: Rig, fields: dict[str, int]) -> None:
    """After so many entries, or within a second or two."""
    trail = rig.open(**fields)
    for number in range(3):
        await trail.append(call_entry(number))
    await until(lambda: (chain.read_head(trail.log.place.head) or trail).count >= 3)  # type: ignore[union-attr]


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
