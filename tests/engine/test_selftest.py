"""The self-test passes a faultless engine, and names the site and the fault of any other."""

import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from rudder.server import config as configuration
from rudder.server.engine import selftest
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from tests.engine.conftest import SMALL
from tests.engine.workers import use_worker

FAULTS = {
    "decode steps": r"layers\.1\.mlp_out: the edit equals the reference in a decode step: off",
    "chunks": r"layers\.1\.mlp_out: .* in a prompt in chunks",
    "blend": r"layers\.1\.mlp_out: the edit equals the reference \(blend and restored norm\)",
    "restored norm": r"layers\.1\.mlp_out: the edit equals the reference \(blend and restored norm\)",
    "cap": r"layers\.1\.mlp_out: the edit equals the reference \(displacement cap\)",
    "gate": r"layers\.1\.mlp_out: the edit equals the reference \(token gate\)",
    "sequence": r"layers\.1\.mlp_out: the edit equals the reference \(sequence condition\)",
    "policy": r"layers\.1\.mlp_out: the edit of a policy equals the reference: off",
    "top-k": r"layers\.2\.resid_post: the top-k latents have these activations",
    "counts": r"layers\.1\.mlp_out: an edit touched 0 of 13 tokens",
    "half of the stream": r"layers\.2\.resid_post: it reads the residual stream of the model",
    "multiplier": r"layers\.1\.mlp_out: the model goes on with the edited residual stream",
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def faulty() -> AsyncIterator[Engine]:
    """Start an engine whose worker can be given a fault, with a stage for a policy."""
    with pytest.MonkeyPatch.context() as patch:
        use_worker(patch, "tests.engine.worker_faulty.Worker")
        started = await start_engine(configuration.load(None, SMALL | {"policies.stages": "1"}))
    yield started
    await started.stop()


async def test_faultless_engine_passes_in_short_time(faulty: Engine) -> None:
    begin = time.monotonic()
    await selftest.run(faulty)
    # 3 sites in 2 stages.
    assert time.monotonic() - begin < 2.0 * 6
    assert faulty.healthy


@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_fails_the_self_test_by_name(faulty: Engine, fault: str) -> None:
    await faulty.llm.collective_rpc("rudder_fault", args=(fault,))
    with pytest.raises(selftest.SelfTestFailed, match=FAULTS[fault]):
        await selftest.run(faulty)
    await faulty.llm.collective_rpc("rudder_fault", args=("",))


async def test_engine_passes_again_without_faults(faulty: Engine) -> None:
    await selftest.run(faulty)
