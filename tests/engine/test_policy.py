"""The operator's program: after every request's own edits, whatever those are."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from vllm import SamplingParams

from rudder.server import config as configuration
from rudder.server.engine import selftest
from rudder.server.engine.call import Call, Outcome
from rudder.server.engine.engine import Engine
from rudder.server.program.compile import compile_program
from rudder.server.program.errors import ProgramError
from rudder.v1 import program_pb2 as pb

SITE = "layers.2.resid_post"
POLICY = """
name: always-low
sites:
- site: layers.2.resid_post
  edits:
  - row: {feature: {index: 7}}
    set: 3.0
"""
PROMPT = (1, *range(200, 216))
SMALL = {
    "engine.enforce_eager": "true",
    "engine.max_model_len": "128",
    "engine.kv_cache_memory_bytes": str(1 << 27),
    "programs.always": "always-low",
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """An engine with a policy, self-tested in both stages."""
    folder: Path = tmp_path_factory.mktemp("programs")
    (folder / "always-low.yaml").write_text(POLICY)
    started = await Engine.start(configuration.load(None, SMALL | {"programs.folder": str(folder)}))
    await selftest.run(started)
    yield started
    await started.stop()


async def outcome(engine: Engine, call: Call) -> Outcome:
    """How a call ended."""
    last = [output async for output in engine.stream(call)][-1].outcome
    assert last is not None
    return last


async def residuals_after(engine: Engine, call: Call) -> tuple[Outcome, np.ndarray]:
    """The outcome, and the residual stream behind the site's edits [tokens, d]."""
    last = await outcome(engine, call)
    parts = [np.frombuffer(capture.after, "<f4") for capture in last.captures if capture.site == 0]
    return last, np.concatenate(parts).reshape(-1, engine.model.hidden_size)[: len(call.prompt_ids)]


def against() -> pb.Program:
    """A program that pushes hard against the policy's feature."""
    edit = pb.Edit(row=pb.Row(feature=pb.Feature(index=7)), add=-50.0)
    return pb.Program(sites=[pb.SiteEdits(site=SITE, edits=[edit])])


async def test_the_policy_applies_to_everyone_and_is_attested(guarded: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    plain = Call(PROMPT, params)
    last = await outcome(guarded, plain)
    assert last.moved == ()
    assert last.policy_moved == (len(PROMPT) - 1 + 3,)


async def test_no_request_can_steer_it_away(guarded: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    steered = Call(PROMPT, params, compile_program(against(), guarded.registry), report_prompt=True, capture=True)
    last, after = await residuals_after(guarded, steered)
    sae = next(iter(guarded.bundles.values())).sae
    row = sae.exact_rows(torch.tensor([7]))
    before = np.concatenate([np.frombuffer(c.before, "<f4") for c in last.captures]).reshape(after.shape[0], -1)
    pushed = before + (-50.0) * row.decoder.numpy()
    z = pushed @ row.encoder.numpy()[0] + float(row.bias[0])
    f = np.where(z > float(row.threshold[0]), z, 0.0)
    expected = pushed + (3.0 - f)[:, None] * row.decoder.numpy()
    np.testing.assert_allclose(after[1:], expected[1:], rtol=1e-3, atol=1e-3)
    assert last.moved == last.policy_moved == (len(PROMPT) - 1,)


async def test_a_policy_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(configuration.ConfigError, match=r"programs\.always: 'always-low' is not in"):
        await Engine.start(configuration.load(None, SMALL | {"programs.folder": str(tmp_path)}))


async def test_a_named_program_that_does_not_fit_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "always-low.yaml").write_text(POLICY.replace("index: 7", "index: 99999"))
    with pytest.raises(ProgramError, match="feature"):
        await Engine.start(configuration.load(None, SMALL | {"programs.folder": str(tmp_path)}))
