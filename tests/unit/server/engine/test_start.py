"""The start of an engine: rows held from then on, the default policy, and cancellation."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rudder.sae_models import concepts
from rudder.sae_models.concepts import ConceptError
from rudder.server.config import Config, ConfigError, Policies
from rudder.server.engine import adapter
from rudder.server.engine.ledger import Ledger
from rudder.server.engine.start import (
    check_bos,
    default_policy,
    layout_of,
    load_concepts,
    reserved_request,
    reserved_rows,
    start_llm,
)
from rudder.server.program import wire
from rudder.server.program.errors import ProgramError
from rudder.server.program.layout import Layout
from rudder.server.program.named import NamedProgram
from rudder.server.program.rows import Registry
from tests.unit.programs import REGISTRY, SITE, VECTOR, compiled, feature, program
from tests.unit.reference import BUNDLE, WIDTH
from tests.unit.topics import STARS, concepts_of

TWO_STAGES = Registry(Layout(REGISTRY.layout.sites, rows=4, slots=2, stages=2), WIDTH, REGISTRY.dictionaries)
NUMBER = TWO_STAGES.layout.sites.index(SITE)
PINNED = (wire.Site(NUMBER, (wire.Row(BUNDLE, 0),), watch=(0,)),)


def policy(*latents: int) -> NamedProgram:
    """Build a policy that edits these latents."""
    edits = [{"row": feature(latent), "ablate": True} for latent in latents]
    return NamedProgram(program(*edits), compiled(*edits))


def test_rows_of_policies_and_pinned_features_are_shared() -> None:
    request = reserved_request(PINNED, {"a": policy(0, 1), "b": policy(1, 2)}, TWO_STAGES)
    assert reserved_rows(request) == {NUMBER: {wire.Row(BUNDLE, latent) for latent in (0, 1, 2)}}
    assert not request.edits
    assert request.stages[0] == PINNED


def test_policy_that_does_not_fit_is_named() -> None:
    policies = {"a": policy(0, 1), "b": policy(1, 2), "c": policy(2, 3, 5)}
    with pytest.raises(ProgramError, match=r"^policy c: 5 distinct rows at layers\.1\.resid_post, which has 4 places"):
        reserved_request(PINNED, policies, TWO_STAGES)


def test_pinned_features_that_do_not_fit_are_named() -> None:
    pinned = (wire.Site(NUMBER, tuple(wire.Row(BUNDLE, latent) for latent in range(5)), watch=(0,)),)
    with pytest.raises(ProgramError, match=r"^watch: 5 distinct rows"):
        reserved_request(pinned, {}, TWO_STAGES)


def test_concepts_of_another_bundle_or_without_their_rows_are_refused(tmp_path: Path) -> None:
    manifest = SimpleNamespace(
        name=BUNDLE, site=SITE, latents=6, model=SimpleNamespace(sha256="m"), files={"sae.safetensors": "ab"}
    )
    bundle: Any = SimpleNamespace(path=tmp_path, manifest=manifest)
    assert load_concepts({BUNDLE: bundle}) == {}
    concepts.write(tmp_path / concepts.FILE, concepts_of(STARS))
    assert load_concepts({BUNDLE: bundle}) == {BUNDLE: concepts_of(STARS)}
    manifest.latents = 3
    with pytest.raises(ConceptError, match=r"concepts\.yaml: .* has latents 0 to 2, not 3"):
        load_concepts({BUNDLE: bundle})
    manifest.latents, manifest.files = 6, {"sae.safetensors": "cd"}
    with pytest.raises(ConceptError, match="another SAE"):
        load_concepts({BUNDLE: bundle})


def test_bound_request_needs_no_free_row() -> None:
    ledger = Ledger(TWO_STAGES.layout)
    low = policy(1, 2)
    ledger.acquire(0, reserved_request((), {"low": low}, TWO_STAGES))
    client = wire.Request(1, 4, True, (compiled({"row": VECTOR, "add": 1}, {"row": feature(3), "add": 1}).sites, ()))
    ledger.acquire(1, client)
    assert ledger.rows_used(NUMBER) == 4
    assert ledger.insufficient(wire.Request(1, 4, True, (client.stages[0][:0], low.compiled.sites))) is None
    lease = ledger.acquire(2, wire.Request(1, 4, True, ((), low.compiled.sites)))
    assert (lease.slot, lease.unfilled) == (2, ())
    ledger.release(1)
    ledger.release(2)
    assert ledger.rows_used(NUMBER) == 2


def test_default_policy_must_be_in_the_folder() -> None:
    policies = {"low": policy(1)}
    assert default_policy(Config(policies=Policies(folder="f", default="low")), policies) is policies["low"].compiled
    assert default_policy(Config(policies=Policies(folder="f")), policies) is None
    with pytest.raises(ConfigError, match=r"^policies\.default: 'high' is not in f$"):
        default_policy(Config(policies=Policies(folder="f", default="high")), policies)
    with pytest.raises(ConfigError, match=r"^policies\.default: 'low' is not in policies\.folder$"):
        default_policy(Config(policies=Policies(default="low")), {})


def test_layout_has_a_second_stage_when_a_policies_folder_is_configured() -> None:
    stages = [layout_of(Config(policies=policies), {}).stages for policies in (Policies(), Policies(folder="f"))]
    assert stages == [1, 2]


async def test_cancelled_start_shuts_vllm_down(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def slow_start(*_: Any) -> Any:
        events.append("begin")
        time.sleep(0.2)
        events.append("up")
        return SimpleNamespace(shutdown=lambda: events.append("down"))

    monkeypatch.setattr(adapter, "start_llm", slow_start)
    task = asyncio.create_task(start_llm(Config(), TWO_STAGES.layout))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == ["begin", "up", "down"]


@pytest.mark.parametrize(
    ("trained", "adds", "warned"),
    [(True, True, False), (False, False, False), (None, True, False), (True, False, True), (False, True, True)],
)
def test_sae_trained_with_another_rule_for_bos_is_reported(
    trained: bool | None, adds: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = SimpleNamespace(name="sae", context=SimpleNamespace(prepend_bos=trained))
    bundle: Any = SimpleNamespace(manifest=manifest)
    check_bos(bundle, adds)
    assert bool(caplog.records) == warned
