"""The start of an engine: stages for policies, and cancellation."""

import asyncio
import multiprocessing
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rudder.sae_models import concepts
from rudder.sae_models.concepts import ConceptError
from rudder.server.config import Config, Engine, Policies
from rudder.server.engine import adapter, start
from rudder.server.engine.start import check_bos, layout_of, load_concepts, start_llm
from tests.unit.programs import REGISTRY, SITE
from tests.unit.reference import BUNDLE
from tests.unit.topics import STARS, concepts_of

LAYOUT = REGISTRY.layout


def test_layout_has_one_stage_more_for_each_policy() -> None:
    stages = [layout_of(Config(policies=Policies(stages=stages)), {}).stages for stages in (0, 1, 3)]
    assert stages == [1, 2, 4]


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


async def test_cancelled_start_shuts_vllm_down(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def slow_start(*_: Any) -> Any:
        events.append("begin")
        time.sleep(0.2)
        events.append("up")
        return SimpleNamespace(shutdown=lambda: events.append("down"))

    monkeypatch.setattr(adapter, "start_llm", slow_start)
    task = asyncio.create_task(start_llm(Config(), LAYOUT))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == ["begin", "up", "down"]


def hanging_process(*_: Any) -> Any:
    """Start a process that never says that it is ready, and wait for it, as vLLM does."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    process.join()
    raise RuntimeError("Engine core initialization failed")


def hanging_thread(*_: Any) -> Any:
    """Hang without a process."""
    threading.Event().wait()


@pytest.mark.parametrize("hang", [hanging_process, hanging_thread])
async def test_start_that_hangs_ends_with_an_error(hang: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "start_llm", hang)
    monkeypatch.setattr(start, "ABANDON_S", 0.2 if hang is hanging_thread else 30.0)
    with pytest.raises(adapter.EngineStartError, match=r"within engine\.start_timeout_s, 0\.05 s"):
        await asyncio.wait_for(start_llm(Config(engine=Engine(start_timeout_s=0.05)), LAYOUT), 20)
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


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
