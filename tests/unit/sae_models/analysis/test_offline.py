"""Offline evaluation of the shipped programs agrees with the bank."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rudder.sae_models import PRETRAINED
from rudder.sae_models.analysis import program as offline
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.sae import Normalisation
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program import wire
from rudder.server.program.compile import compile_program
from rudder.server.program.layout import Layout
from rudder.server.program.named import read_program
from rudder.server.program.rows import Dictionary, Registry

PROGRAMS = sorted((PRETRAINED / "programs").glob("*.yaml"))


def strongest_first(x: torch.Tensor, program: offline.Program) -> torch.Tensor:
    """Return tokens [n, d] by the sequence condition's score, highest first, so that the gate opens and then closes."""
    if not (program.gate and program.gate.sequence and program.gate.sequence.score.probe):
        return x
    return x[(x @ torch.tensor(program.gate.sequence.score.probe.weights)).argsort(descending=True)]


@pytest.mark.parametrize("normalisation", Normalisation)
@pytest.mark.parametrize("excluded", [(), (5, 10, 20, 90)], ids=["all", "excluded"])
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_bank_moves_x_like_offline_evaluation(
    path: Path, excluded: tuple[int, ...], normalisation: Normalisation
) -> None:
    bundle = bundles.load(PRETRAINED / "textbook-lm-layers.2")
    bundle = replace(bundle, sae=replace(bundle.sae, normalisation=normalisation))
    program = offline.read(path)
    x = strongest_first(bundle.conformance.inputs, program)[:200]
    layout = Layout((bundle.manifest.site,), rows=64, slots=1)
    held = {layout.sites[0]: {bundle.manifest.name: bundle.sae}} if normalisation is not Normalisation.NONE else {}
    driver = Driver(layout, build_banks(layout, x.shape[1], 201, torch.device("cpu"), held))
    driver.load_sae(bundle.manifest.name, bundle.sae)
    norm = bundle.sae.decoder.norm(dim=1).numpy()
    known = Dictionary(
        bundle.manifest.name, bundle.manifest.site, bundle.sha256, bundle.sae.latents,
        bundle.statistics.max_activation.numpy(), norm, bundle.statistics.mean.numpy(),
        lambda latent: torch.stack([bundle.sae.encoder[latent], bundle.sae.decoder[latent]]).numpy(),
    )  # fmt: skip
    compiled = compile_program(read_program(path), Registry(layout, x.shape[1], {known.name: known}))
    driver.admit("r", 1, wire.Request(200, 200, False, (compiled.sites,), excluded=excluded))
    driver.write_token_metadata(["r"], np.array([0]), np.array([200]))
    moved = x + driver.banks[0](x)
    counted = ~torch.isin(torch.arange(len(x)), torch.tensor(excluded, dtype=torch.long))
    expected = offline.apply(program, bundle, x[None], counted[None]).x[0]
    assert torch.equal(moved[~counted], x[~counted])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-3)
    assert not torch.equal(moved, x)
