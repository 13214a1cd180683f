"""Banks on a device beside the CPU: no operation mixes devices."""

from random import Random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from rudder.sae_models.sparse.screening import prepare_screening
from rudder.server.engine.telemetry.frame import Frame
from rudder.server.engine.worker import transfer
from rudder.server.engine.worker.reader import Readable, Reader
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.pretended_gpu import DEVICE, pretended_gpu
from tests.unit.reference import BUNDLE, CPU, WIDTH, Floats, grid, make_driver, random_request, run_step, toy_sae

LAYOUT = Layout(("layers.0.resid_post", "layers.1.mlp_out"), rows=64, slots=5, stages=2, window=4)
PROMPT, TOKENS = 3, 6


def run(seed: int, device: torch.device) -> tuple[list[dict[str, Floats]], list[Frame]]:
    """Run a prefill and decode steps of random requests, with every kind of report; return displacements and frames."""
    rng = Random(seed)
    sae = toy_sae(rng)
    driver = make_driver(LAYOUT, sae, device=device)
    reader = Reader(driver.banks)
    reader.dictionaries[0] = Readable(prepare_screening(sae.to(device)), [0])
    requests = {name: random_request(rng, LAYOUT, TOKENS) for name in ("a", "b")}
    watching = wire.Site(1, (wire.Row(BUNDLE, 0),), watch=(0,))
    requests["watches"] = wire.Request(PROMPT, TOKENS, True, ((watching,), ()), watch_prompt=True)
    requests["strongest"] = wire.Request(PROMPT, TOKENS, True, ((), ()), top_k=2, top_k_sites=(0,))
    requests["captures"] = wire.Request(PROMPT, TOKENS, True, ((), ()), capture=True)
    for handle, (name, request) in enumerate(requests.items(), 1):
        driver.admit(name, handle, request)
    xs = {name: grid(rng, len(LAYOUT.sites), TOKENS, WIDTH, top=4) for name in requests}
    moves, frames = list[dict[str, Floats]](), list[Frame]()
    for start, length in ((0, PROMPT), *((position, 1) for position in range(PROMPT, TOKENS))):
        moves.append(run_step(driver, [(name, start, length) for name in requests], xs))
        frames.append(reader.read(driver.step, ()).frame(len(frames)))
    for name in requests:
        driver.finish(name)
    return moves, frames


@pytest.mark.parametrize("seed", range(4))
def test_another_device_gives_the_same_displacements_and_frames(seed: int) -> None:
    moves, frames = run(seed, CPU)
    with pretended_gpu(), patch.object(transfer, "record_event", lambda _: transfer.Reached()):
        moves_there, frames_there = run(seed, DEVICE)
    for here, there in zip(moves, moves_there, strict=True):
        for name, move in here.items():
            np.testing.assert_allclose(there[name], move, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(frames_there, frames, strict=True):
        np.testing.assert_allclose(np.frombuffer(ours.statistics), np.frombuffer(theirs.statistics))
        assert replace(ours, statistics=b"") == replace(theirs, statistics=b"")
