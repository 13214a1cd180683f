"""What has been in force is known at the next start: nothing older takes its place, nothing is missing unnoticed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from rudder.sae_models.errors import UserError
from rudder.server.config import Audit, Config, Policies
from rudder.server.safety import start as starts
from rudder.server.safety.audit import chain
from rudder.server.safety.memory import FILE, Known, Memory
from rudder.server.safety.policy import Policy, digest_of_message
from rudder.server.safety.problems import PolicyInvalid
from rudder.server.safety.start import start_with_policies
from rudder.v1 import policy_pb2
from tests.unit.policies import REGISTRY, HoldingEngine, message, removal
from tests.unit.server.safety.audit.trails import KEY, open_log, settings


def noted(memory: Memory, source: str, *messages: policy_pb2.Policy) -> Memory:
    """Put policies in force in a memory."""
    for one in messages:
        assert memory.objections(one) == []
        memory.note(Policy(one, digest_of_message(one)), source)
    return memory


def configured(place: Path, **fields: Any) -> Config:
    """A configuration with an audit log and its key."""
    return Config(audit=settings(place), policies=Policies(allow_uncertified=True, stages=2, **fields))


def write(folder: Path, policy: policy_pb2.Policy, file: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{file or policy.name}.yaml"
    path.write_text(yaml.safe_dump(json_format.MessageToDict(policy, preserving_proto_field_name=True)))
    return path


def test_what_is_noted_is_read_again(tmp_path: Path) -> None:
    config = configured(tmp_path)
    memory = noted(Memory.open(config), "a file", message("a", version=2), message("b"), removal("b"))
    noted(memory, "caller anna", message("c", version=7))
    again = Memory.open(config)
    assert again.known == memory.known
    assert {name: (k.version, k.removed, k.from_file) for name, k in again.known.items()} == {
        "a": (2, False, True), "b": (2, True, True), "c": (7, False, False),
    }  # fmt: skip
    assert again.missing([]) == {"a": 2}
    assert again.missing(["a", "b"]) == {}


def test_policy_of_a_file_that_a_caller_replaced_stays_one_of_a_file() -> None:
    memory = noted(Memory(), "low.yaml", message())
    noted(memory, "caller anna", message(version=2))
    assert memory.missing([]) == {"low": 2}
    noted(memory, "caller anna", removal(version=3), message(version=4))
    assert memory.missing([]) == {}


@pytest.mark.parametrize("change", ["version", "removed", "seal", "key", "text"])
def test_file_that_was_changed_is_refused(change: str, tmp_path: Path) -> None:
    config = configured(tmp_path)
    noted(Memory.open(config), "a file", message(version=3))
    path = tmp_path / "log" / FILE
    text = path.read_text()
    changes = {
        "version": text.replace('"version": 3', '"version": 1'),
        "removed": text.replace('"removed": false', '"removed": true'),
        "seal": text.replace('"seal": "', '"seal": "0'),
        "text": text[:-9],
    }
    if change == "key":
        (tmp_path / "audit.key").write_text("ab" * 32 + "\n")
    else:
        assert changes[change] != text
        path.write_text(changes[change])
    with pytest.raises(UserError, match=r"policies\.json: "):
        Memory.open(config)


def test_file_that_is_gone_or_older_is_made_good_by_the_audit_log(tmp_path: Path) -> None:
    config = configured(tmp_path)
    memory = noted(Memory.open(config), "low.yaml", message(version=1))
    older = (tmp_path / "log" / FILE).read_bytes()
    log, digest = open_log(tmp_path / "log"), "d" * 64
    for name, version, change, source in (
        ("low", 3, "applied", "low.yaml"), ("low", 4, "applied", "caller anna"), ("high", 1, "applied", "start"),
        ("high", 2, "removed", "caller anna"), ("wire", 1, "applied", "caller anna"), ("bad", 9, "refused", "bad.yaml"),
    ):  # fmt: skip
        policy = {"name": name, "version": version, "digest": digest, "mode": "enforce"}
        log.append([{"kind": "policy", "change": change, "source": source, "policy": policy}])
    log.append([{"kind": "call", "policies": [{"name": "called", "version": 9}]}])
    log.close()
    expected = {
        "low": Known(4, digest, from_file=True), "high": Known(2, digest, removed=True, from_file=True),
        "wire": Known(1, digest),
    }  # fmt: skip
    assert Memory.open(config).known == expected
    (tmp_path / "log" / FILE).unlink()
    assert Memory.open(config).known == expected
    assert older
    assert memory.known["low"].version == 1


def test_without_a_place_nothing_is_kept() -> None:
    assert noted(Memory.open(Config()), "a file", message()).path is None


def test_place_without_an_audit_log_is_not_sealed(tmp_path: Path) -> None:
    config = Config(policies=Policies(state=str(tmp_path / "kept" / "state.json")))
    noted(Memory.open(config), "a file", message(version=2))
    assert Memory.open(config).known["low"].version == 2


class Stopping(HoldingEngine):
    """Can be stopped."""

    async def stop(self) -> None:
        """Stop."""


@pytest.fixture
def _started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start_engine(_: Config, __: Any, check: Any) -> Stopping:
        check(REGISTRY)
        return Stopping()

    monkeypatch.setattr(starts, "start_engine", start_engine)
    monkeypatch.setattr("rudder.server.preflight.check", lambda config: config)


MISSING = "low: version 2 was in force, and no file has it"
STARTS: dict[str, tuple[policy_pb2.Policy | None, str | dict[str, int]]] = {
    "the same": (message(version=2), {"low": 2}),
    "newer": (message(version=3), {"low": 3}),
    "older": (message(version=1), "version: is 1, and version 2 with another content has been in force: raise it"),
    "of the same version": (message(version=2, max_displacement=9), "is 2, and version 2 with another content"),
    "gone": (None, MISSING),
    "of another name": (message("other"), MISSING),
    "removed": (removal(version=3), {}),
    "removed in an older version": (removal(version=1), "version: is 1, and version 2 with another content"),
    "removed with more": (message(version=3, removed=True), "binds: is set"),
}


@pytest.mark.usefixtures("_started")
@pytest.mark.parametrize("case", STARTS)
async def test_start_after_a_policy_was_in_force(case: str, tmp_path: Path) -> None:
    left, expected = STARTS[case]
    folder = tmp_path / "policies"
    config = configured(tmp_path, folder=str(folder))
    write(folder, message(version=2), "file")
    await start_with_policies(config)
    (folder / "file.yaml").unlink()
    if left is not None:
        write(folder, left, "file")
    for _ in range(2):
        if isinstance(expected, str):
            with pytest.raises(PolicyInvalid, match=expected):
                await start_with_policies(config)
            continue
        _, store = await start_with_policies(config)
        assert {name: policy.version for name, policy in store.in_force.items()} == expected


@pytest.mark.usefixtures("_started")
async def test_policy_that_was_removed_stays_so_although_it_has_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    config = configured(tmp_path, folder=str(folder))
    write(folder, message(version=2))
    _, store = await start_with_policies(config)
    await store.apply(removal(version=3), "caller anna")
    for version, expected in ((2, {}), (3, {}), (4, {"low": 4})):
        write(folder, message(version=version))
        _, store = await start_with_policies(config)
        assert {name: policy.version for name, policy in store.in_force.items()} == expected


@pytest.mark.usefixtures("_started")
async def test_policies_without_a_folder_are_missing_too(tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    write(folder, message(version=2))
    await start_with_policies(configured(tmp_path, folder=str(folder)))
    (tmp_path / "audit.key").rename(tmp_path / "kept.key")
    audit = Audit(folder=str(tmp_path / "log"), key_file=str(tmp_path / "kept.key"))
    with pytest.raises(PolicyInvalid, match="low: version 2 was in force"):
        await start_with_policies(Config(audit=audit))
    assert chain.read_key(tmp_path / "kept.key") != KEY
