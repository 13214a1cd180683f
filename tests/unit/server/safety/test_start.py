"""An engine starts with the policies of its folder, or not at all."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from google.protobuf import json_format
from msgspec import structs

from rudder.server.config import Config, Policies
from rudder.server.engine.ledger import PINNED_HANDLE
from rudder.server.program import wire
from rudder.server.program.errors import ProgramError
from rudder.server.program.layout import Layout
from rudder.server.program.named import ProgramFileError, load_policies
from rudder.server.program.rows import Registry
from rudder.server.program.watch import compile_watch
from rudder.server.safety import start as starts
from rudder.server.safety.problems import PolicyInvalid
from rudder.server.safety.start import check_policies, check_rows, start_with_policies, with_stages
from rudder.v1 import program_pb2
from tests.unit.policies import REGISTRY, HoldingEngine, editing, latent, message, policy
from tests.unit.programs import SITE
from tests.unit.reference import WIDTH

TIGHT = Registry(Layout(REGISTRY.layout.sites, rows=1, slots=2, stages=3), WIDTH, REGISTRY.dictionaries)


def write(folder: Path, name: str, **fields: Any) -> None:
    document = json_format.MessageToDict(message(name, **fields), preserving_proto_field_name=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))


class StoppableEngine(HoldingEngine):
    """Notes that it was stopped."""

    stopped = False
    bundles: ClassVar[dict[str, Any]] = {}

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[StoppableEngine]:
    """The engines that were started, each once `check` had passed."""
    started: list[StoppableEngine] = []

    async def start_engine(config: Config, _: Any, check: Any) -> StoppableEngine:
        assert config.policies.stages == 2
        check(REGISTRY)
        started.append(StoppableEngine())
        return started[-1]

    monkeypatch.setattr(starts, "start_engine", start_engine)
    monkeypatch.setattr("rudder.server.preflight.check", lambda config: config)
    return started


def config_of(folder: Path) -> Config:
    return Config(policies=Policies(folder=str(folder), stages=1, allow_uncertified=True))


async def test_every_policy_of_the_folder_is_in_force(tmp_path: Path, engines: list[StoppableEngine]) -> None:
    for index, name in enumerate(("a", "b"), 2):
        write(tmp_path, name, program=editing(index))
    engine, store = await start_with_policies(config_of(tmp_path))
    assert list(store.in_force) == ["a", "b"]
    assert engine is engines[0]  # type: ignore[comparison-overlap]
    await store.reload()
    assert len(engines[0].held) == 2
    assert not engines[0].stopped


async def test_invalid_policy_stops_the_start_before_the_engine(tmp_path: Path, engines: list[StoppableEngine]) -> None:
    write(tmp_path, "a", program=editing(99))
    write(tmp_path, "b", program=editing(2), version=0)
    with pytest.raises(PolicyInvalid) as caught:
        await start_with_policies(config_of(tmp_path))
    assert [problem.field.removeprefix(str(tmp_path)) for problem in caught.value.problems] == [
        "/a.yaml: program.sites[0].edits[0].row.feature.index",
        "/b.yaml: version",
    ]
    assert engines == []


async def test_policy_that_cannot_be_held_stops_the_engine(
    tmp_path: Path, engines: list[StoppableEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, program=editing(2 if name == "a" else 3))

    async def no_room(*_: Any) -> int:
        raise ProgramError("program", "no room")

    monkeypatch.setattr(StoppableEngine, "hold", no_room)
    with pytest.raises(ProgramError):
        await start_with_policies(config_of(tmp_path))
    assert [engine.stopped for engine in engines] == [True]


async def test_latents_that_policies_watch_are_pinned_once_each(
    tmp_path: Path, engines: list[StoppableEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a", watch=[{"site": SITE, "row": latent(3)}, {"site": SITE, "row": latent(2)}])
    write(tmp_path, "b", watch=[{"site": SITE, "row": latent(3)}], program=editing(5))
    write(tmp_path, "c", program=editing(5))
    configured = [(SITE, json_format.ParseDict(latent(2), program_pb2.Row()))]
    monkeypatch.setattr(starts, "watched_rows", lambda *_: configured)
    pinned: list[tuple[str, int]] = []

    async def pin_features(engine: StoppableEngine, features: Any) -> None:
        pinned.extend((site, row.feature.index) for site, row in features)
        rows = tuple(compile_watch(features, REGISTRY, "watch"))
        site = wire.Site(rows[0].site, tuple(dict.fromkeys(row.row for row in rows)))
        engine.admission.reserve(PINNED_HANDLE, wire.Request(0, 0, False, ((site,),)))

    monkeypatch.setattr(starts, "pin_features", pin_features)
    _, store = await start_with_policies(config_of(tmp_path))
    assert pinned == [(SITE, 2), (SITE, 3)]
    assert list(store.in_force) == ["a", "b", "c"]
    assert len(engines) == 1


def test_stages_are_those_that_policies_need_or_the_configuration_asks_for() -> None:
    messages = {Path(name): message(name, program=editing(5)) for name in ("a", "b")}
    for asked, expected in ((0, 2), (1, 2), (5, 5)):
        config = structs.replace(Config(), policies=Policies(stages=asked))
        assert with_stages(config, messages).policies.stages == expected
    assert with_stages(Config(), {}).policies.stages == 0


def test_rows_of_all_policies_must_have_places() -> None:
    a, b = (policy(name, program=editing(index)) for name, index in (("a", 5), ("b", 3)))
    check_rows([a, b], REGISTRY)
    check_rows([a, a], TIGHT)
    with pytest.raises(PolicyInvalid, match=rf"^policy 'b': program: 2 distinct rows at {SITE}, which has 1 places"):
        check_rows([a, b], TIGHT)
    with pytest.raises(PolicyInvalid, match="2 distinct rows"):
        check_policies({Path(p.name): p.message for p in (a, b)}, TIGHT)


def test_folder_of_policies_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a", program=editing(2))
    assert {path.name: one.name for path, one in load_policies(tmp_path).items()} == {"a.yaml": "a"}
    (tmp_path / "b.yaml").write_text((tmp_path / "a.yaml").read_text())
    with pytest.raises(ProgramFileError, match=r"b\.yaml: name: 'a' is the policy of a\.yaml, too"):
        load_policies(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nsites: []\n", "is a program, not a policy: write it below `program:`"),
        ("name: a\ngate: {}\n", "is a program, not a policy"),
        ("version: 1\n", "name: is empty"),
        ("- a\n", "is not a mapping of a policy's fields"),
        ("name: a\nversion: x\nmode: SOFT\n", r"version.*; .*mode"),
    ],
)
def test_file_that_is_no_policy_says_what_to_write(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ProgramFileError, match=problem) as caught:
        load_policies(tmp_path)
    assert "bad.yaml" in str(caught.value)
