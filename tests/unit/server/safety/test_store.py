"""Policies in force: replaced, refused, removed and read again, with the rows of those that calls still use held."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from rudder.server.caller import ANONYMOUS
from rudder.server.monitoring import series
from rudder.server.safety import store as stores
from rudder.server.safety.problems import PolicyInvalid
from rudder.server.safety.store import PolicyStore
from tests.unit.policies import HoldingEngine, editing, latent, message, removal
from tests.unit.programs import SITE


def store_of(folder: Path | None = None) -> tuple[PolicyStore, HoldingEngine]:
    engine = HoldingEngine()
    return PolicyStore(engine, folder, allow_uncertified=True), engine  # type: ignore[arg-type]


def write(folder: Path, file: str = "low", **fields: Any) -> Path:
    """Write the file of a policy; of a string, the string."""
    path = folder / f"{file}.yaml"
    path.write_text(yaml.safe_dump(json_format.MessageToDict(message(**fields), preserving_proto_field_name=True)))
    return path


def in_force(store: PolicyStore) -> dict[str, int]:
    return {name: policy.version for name, policy in store.in_force.items()}


def outcomes(engine: HoldingEngine) -> dict[str, float]:
    (family,) = engine.metrics.values[series.POLICY_CHANGES].collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.value}


async def test_new_version_takes_the_place_of_the_old_one_and_frees_its_rows() -> None:
    store, engine = store_of()
    first = await store.apply(message(program=editing(5)), "test")
    assert in_force(store) == {"low": 1}
    assert store.binding(ANONYMOUS).policies == (first,)
    second = await store.apply(message(version=2, program=editing(3)), "test")
    assert store.binding(ANONYMOUS).policies == (second,)
    assert (list(engine.held), engine.dropped) == ([-1, -2], [-1])
    assert list(engine.admission.reservations) == [-2]


async def test_running_call_keeps_its_policy_and_the_rows_of_it() -> None:
    store, engine = store_of()
    first = await store.apply(message(program=editing(5)), "test")
    bound = store.binding(ANONYMOUS)
    for _ in range(2):
        store.acquire(bound.policies)
    await store.apply(message(version=2, program=editing(3)), "test")
    assert (bound.policies, engine.dropped) == ((first,), [])
    store.release(bound.policies)
    assert engine.dropped == []
    store.release(bound.policies)
    assert engine.dropped == [-1]
    # The end of a call under a policy in force frees nothing.
    bound = store.binding(ANONYMOUS)
    store.acquire(bound.policies)
    store.release(bound.policies)
    assert engine.dropped == [-1]


async def test_version_must_rise_with_another_content() -> None:
    store, engine = store_of()
    first = await store.apply(message(version=3, program=editing(5)), "test")
    assert await store.apply(message(version=3, program=editing(5)), "test") is first
    for version in (2, 3):
        with pytest.raises(PolicyInvalid) as caught:
            await store.apply(message(version=version, program=editing(3)), "test")
        assert [problem.field for problem in caught.value.problems] == ["version"]
    assert (in_force(store), list(engine.held)) == ({"low": 3}, [-1])


async def test_policy_without_room_is_refused_and_the_old_one_stays() -> None:
    store, engine = store_of()
    await store.apply(message(program=editing(5)), "test")
    site = engine.registry.layout.sites.index(SITE)
    taken = engine.admission.ledger.free_rows[site]
    free, engine.admission.ledger.free_rows[site] = taken, []
    with pytest.raises(PolicyInvalid, match="cannot be held: the bank has no free rows"):
        await store.apply(message(version=2, program=editing(3)), "test")
    assert (in_force(store), list(engine.admission.reservations)) == ({"low": 1}, [-1])
    engine.admission.ledger.free_rows[site] = free
    await store.apply(message(version=2, program=editing(3)), "test")
    assert in_force(store) == {"low": 2}


async def test_policies_that_need_more_stages_than_there_are_are_refused() -> None:
    store, _ = store_of()
    for name in ("a", "b"):
        await store.apply(message(name, program=editing(5)), "test")
    with pytest.raises(PolicyInvalid, match=r"program: 3 policies with a program .* policies\.stages"):
        await store.apply(message("c", program=editing(5)), "test")
    await store.apply(message("d"), "test")
    await store.apply(message("a", version=2), "test")
    await store.apply(message("c", program=editing(5)), "test")
    assert set(store.in_force) == {"a", "b", "c", "d"}


async def test_rows_that_nobody_counts_are_refused() -> None:
    store, _ = store_of()
    with pytest.raises(PolicyInvalid, match=r"watch\[0\]: is not counted since the start"):
        await store.apply(message(watch=[{"site": SITE, "row": latent(3)}]), "test")


async def test_change_goes_on_when_whoever_asked_for_it_leaves() -> None:
    store, engine = store_of()
    begun, go = asyncio.Event(), asyncio.Event()
    hold = engine.hold

    async def slow_hold(rows: Any) -> int:
        begun.set()
        await go.wait()
        return await hold(rows)

    engine.hold = slow_hold  # type: ignore[method-assign]
    asking = asyncio.create_task(store.apply(message(program=editing(5)), "test"))
    await begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    go.set()
    async with store.changing:
        pass
    assert in_force(store) == {"low": 1}


async def test_listeners_metrics_and_log_hear_of_changes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rudder")
    store, engine = store_of()
    heard: list[stores.Change] = []
    store.listeners.append(heard.append)
    await store.apply(message(program=editing(5), mode="POLICY_MODE_SHADOW"), "test")
    await store.apply(removal(), "test")
    assert [(change.outcome, change.source) for change in heard] == [("applied", "test"), ("removed", "test")]
    assert outcomes(engine) == {"applied": 1, "removed": 1}
    assert [record.getMessage() for record in caplog.records] == ["policy applied", "policy removed"]
    assert caplog.records[0].__dict__["fields"] | {"digest": ""} == {
        "source": "test", "policy": "low", "version": 1, "digest": "", "mode": "shadow",
    }  # fmt: skip
    assert (in_force(store), engine.dropped) == ({}, [-1])


def exported(engine: HoldingEngine) -> set[tuple[str, str, str]]:
    (family,) = engine.metrics.values[series.POLICIES].collect()
    return {(s.labels["policy"], s.labels["version"], s.labels["mode"]) for s in family.samples}


async def test_policies_in_force_are_exported() -> None:
    store, engine = store_of()
    await store.apply(message("a"), "test")
    await store.apply(message("b", mode="POLICY_MODE_SHADOW"), "test")
    assert exported(engine) == {("a", "1", "enforce"), ("b", "1", "shadow")}
    await store.apply(message("a", version=4), "test")
    await store.apply(removal("b"), "test")
    assert exported(engine) == {("a", "4", "enforce")}


async def test_folder_is_read_again(tmp_path: Path) -> None:
    store, engine = store_of(tmp_path)
    write(tmp_path, "low", program=editing(5))
    high = write(tmp_path, "high", name="high")
    await store.reload()
    assert in_force(store) == {"low": 1, "high": 1}
    await store.reload()
    assert outcomes(engine) == {"applied": 2}
    write(tmp_path, "low", version=2, program=editing(3))
    high.rename(tmp_path / "other.yaml")
    await store.reload()
    assert in_force(store) == {"low": 2, "high": 1}
    # A policy that no file defines was applied over the wire, and stays.
    await store.apply(message("wired"), "caller anna")
    assert outcomes(engine) == {"applied": 4, "unchanged": 1}


async def test_policy_whose_file_is_gone_stays_in_force_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = store_of(tmp_path)
    low, high = write(tmp_path, "low", program=editing(5)), write(tmp_path, "high", name="high")
    await store.reload()
    heard: list[stores.Change] = []
    store.listeners.append(heard.append)
    low.unlink()
    write(tmp_path, "high", name="renamed")
    await store.reload()
    assert in_force(store) == {"low": 1, "high": 1, "renamed": 1}
    refused = [change.policy.name for change in heard if change.outcome == "refused" and change.policy]
    assert sorted(refused) == ["high", "low"]
    assert "stays in force" in caplog.records[-1].__dict__["fields"]["problem"]
    high.unlink()
    await store.reload()
    assert in_force(store) == {"low": 1, "high": 1, "renamed": 1}
    assert outcomes(engine) == {"applied": 3, "refused": 2 + 3}


async def test_policy_is_taken_out_of_force_by_a_removal_alone(tmp_path: Path) -> None:
    store, engine = store_of(tmp_path)
    path = write(tmp_path, "low", version=3, program=editing(5))
    await store.reload()
    heard: list[stores.Change] = []
    store.listeners.append(heard.append)
    for bad, problem in ((removal(version=3), "raise it"), (removal("other", 9), "no policy of this name")):
        with pytest.raises(PolicyInvalid, match=problem):
            await store.apply(bad, "caller anna")
    with pytest.raises(PolicyInvalid, match="binds: is set: a removal has a name and a version"):
        await store.apply(message(version=4, removed=True), "caller anna")
    assert in_force(store) == {"low": 3}
    path.write_text("name: low\nversion: 4\nremoved: true\n")
    for _ in range(2):
        await store.reload()
        assert in_force(store) == {}
    path.unlink()
    await store.reload()
    assert [(c.outcome, c.policy and c.policy.version) for c in heard] == [("removed", 4)]
    assert engine.dropped == [-1]


async def test_removed_policy_does_not_come_back_in_an_older_version(tmp_path: Path) -> None:
    store, _ = store_of(tmp_path)
    await store.apply(message(version=3, program=editing(5)), "caller anna")
    await store.apply(removal(version=4), "caller anna")
    for version in (1, 3, 4):
        with pytest.raises(PolicyInvalid, match=f"is {version}, and version 4 has removed it: raise it"):
            await store.apply(message(version=version), "caller anna")
    await store.apply(removal(version=4), "caller anna")
    await store.apply(message(version=5), "caller anna")
    assert in_force(store) == {"low": 5}


async def test_change_that_cannot_be_remembered_is_refused(tmp_path: Path) -> None:
    store, engine = store_of()
    (tmp_path / "state").mkdir()
    store.memory.path = tmp_path / "state"
    with pytest.raises(PolicyInvalid, match="version: cannot be remembered"):
        await store.apply(message(program=editing(5)), "test")
    assert (in_force(store), engine.dropped, list(engine.admission.reservations)) == ({}, [-1], [])


BAD: dict[str, Callable[[Path], object]] = {
    "torn": lambda path: path.write_text(path.read_text()[:-20] + ": ["),
    "unknown field": lambda path: path.write_text("name: low\nversion: 2\ngates: []\n"),
    "a program": lambda path: path.write_text("name: low\nsites: []\n"),
    "invalid": lambda path: write(path.parent, version=2, program=editing(99)),
    "not raised": lambda path: write(path.parent, program=editing(3)),
    "another's name": lambda path: write(path.parent, name="high", version=2),
    "empty": lambda path: path.write_text(""),
    "unreadable": lambda path: path.rename(path.with_suffix(".old")).parent.joinpath(path.name).mkdir(),
}


@pytest.mark.parametrize("bad", BAD)
async def test_bad_file_keeps_the_old_policy_and_says_so(
    bad: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rudder")
    store, engine = store_of(tmp_path)
    path = write(tmp_path, "low", program=editing(5))
    write(tmp_path, "high", name="high")
    await store.reload()
    before = dict(store.in_force)
    BAD[bad](path)
    await store.reload()
    assert store.in_force == before
    assert outcomes(engine) == {"applied": 2, "refused": 1}
    assert caplog.records[-1].levelname == "ERROR"
    assert str(path) in caplog.records[-1].__dict__["fields"]["problem"]
    if path.is_dir():
        path.rmdir()
    write(tmp_path, "low", version=2, program=editing(3))
    await store.reload()
    assert in_force(store) == {"low": 2, "high": 1}


async def test_file_that_is_renamed_and_wrong_keeps_its_policy(tmp_path: Path) -> None:
    store, _ = store_of(tmp_path)
    low = write(tmp_path, "low", program=editing(5))
    write(tmp_path, "high", name="high")
    await store.reload()
    low.rename(tmp_path / "other.yaml")
    write(tmp_path, "other", version=0)
    for _ in range(2):
        await store.reload()
        assert in_force(store) == {"low": 1, "high": 1}
    write(tmp_path, "other", version=2, program=editing(3))
    await store.reload()
    assert in_force(store) == {"low": 2, "high": 1}


async def test_folder_that_is_gone_keeps_every_policy(tmp_path: Path) -> None:
    store, engine = store_of(tmp_path / "policies")
    (tmp_path / "policies").mkdir()
    write(tmp_path / "policies", "low")
    await store.reload()
    (tmp_path / "policies").rename(tmp_path / "moved")
    await store.reload()
    assert in_force(store) == {"low": 1}
    assert outcomes(engine) == {"applied": 1, "refused": 1}
    (tmp_path / "policies").mkdir()
    await store.reload()
    assert in_force(store) == {"low": 1}
    assert outcomes(engine) == {"applied": 1, "refused": 2}


async def test_changed_file_is_read_once_it_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_of(tmp_path)
    path = write(tmp_path, "low")
    await store.reload()
    versions: list[int] = []
    ticks = iter(range(6))

    async def tick(_: float) -> None:
        versions.append(in_force(store)["low"])
        match next(ticks, None):
            # Half of a file is a valid policy here, of which guards and rights may lack.
            case 1:
                path.write_text("name: low\nversion: 5\n")
            case 2:
                write(tmp_path, "low", version=5, program=editing(5))
            case None:
                raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", tick)
    with pytest.raises(asyncio.CancelledError):
        await store.watch_folder(0.5)
    assert versions == [1, 1, 1, 1, 5, 5, 5]
    assert store.in_force["low"].program


def swap(folder: Path, number: int, **changes: object) -> None:
    """Replace a mounted folder's files as the kubelet does: in a new folder, to which one link is moved."""
    data = folder / f"..{number}"
    data.mkdir()
    os.utime(write(data, "low", **changes), (1, 1))
    (folder / "..tmp").symlink_to(data.name)
    (folder / "..tmp").replace(folder / "..data")
    if not (folder / "low.yaml").is_symlink():
        (folder / "low.yaml").symlink_to("..data/low.yaml")


async def test_swapped_folder_of_a_config_map_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the new file has the time and the size of the old one, as tools that copy times leave it."""
    store, _ = store_of(tmp_path)
    swap(tmp_path, 1)
    await store.reload()
    versions: list[int] = []
    ticks = iter(range(3))

    async def tick(_: float) -> None:
        versions.append(in_force(store)["low"])
        match next(ticks, None):
            case 0:
                swap(tmp_path, 2, version=2)
            case None:
                raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", tick)
    with pytest.raises(asyncio.CancelledError):
        await store.watch_folder(0.5)
    # The link names the file of before until the link to its folder moves; `..data` is no policy itself.
    assert versions == [1, 1, 2, 2]
    assert list(store.files) == [tmp_path / "low.yaml"]


async def test_bindings_are_remembered_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_of()
    await store.apply(message(), "test")
    assert store.binding(ANONYMOUS) is store.binding(ANONYMOUS)
    monkeypatch.setattr(stores, "MAX_BINDINGS", 3)
    for number in range(9):
        assert store.binding(replace(ANONYMOUS, id=str(number))).policies
        assert len(store.bindings) <= 3
