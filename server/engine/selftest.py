"""Start-up self-test: the engine serves only after the bank of each site edited correctly in the running model."""

import asyncio
from dataclasses import replace
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from rudder.sae_models.edit import edit
from rudder.sae_models.errors import UserError
from rudder.sae_models.sae import Normalisation
from rudder.sae_models.sae import gain as input_gain
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, Outcome, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.telemetry.frame import column
from rudder.server.program import wire
from rudder.server.program.compile import compile_program
from rudder.server.program.parameters import edit_parameters, entry_parameters
from rudder.server.program.rows import Dictionary
from rudder.server.program.watch import compile_watch
from rudder.v1 import program_pb2

TOKENS = 12
LATENTS = 4
TOLERANCE = 1e-4


class SelfTestFailed(UserError):
    """The bank of a site disagrees with the reference arithmetic."""


async def run(engine: Engine) -> None:
    """Test every site in every stage, and mark the engine as self-tested. Raises SelfTestFailed."""
    try:
        for number, site in enumerate(engine.registry.layout.sites):
            for stage in range(engine.registry.layout.stages):
                await check_site(engine, number, site, stage)
    except SelfTestFailed:
        engine.metrics.self_test_failed()
        raise
    engine.self_tested = True


async def check_site(engine: Engine, number: int, site: str, stage: int) -> None:
    """Run two equal requests in one batch, edit one of them at one site in one stage, and check both."""
    compiled = compile_program(canary_program(engine, site), engine.registry, field="self-test")
    prompt = tuple(range(3, 3 + TOKENS))
    readable = [d for d in engine.registry.dictionaries.values() if d.site == site and not d.whole_only]
    features = [(site, feature_row(d.name, latent)) for d in readable for latent in likely_latents(d)]
    watch = compile_watch(features, engine.registry, "self-test", prompt=True)

    async def last_output(call: Call) -> Output:
        return [output async for output in engine.stream(call)][-1]

    params = SamplingParams(temperature=0.0, max_tokens=1)
    plain_call = Call(prompt, params, watch=watch, capture=True)
    canary = replace(plain_call, compiled=compiled) if stage == 0 else replace(plain_call, policy=compiled)
    steered, plain = await asyncio.gather(last_output(canary), last_output(plain_call))
    width = engine.model.hidden_size
    (before, after), (plain_before, plain_after) = residuals(steered, number, width), residuals(plain, number, width)
    require_close(site, "an unsteered neighbour is untouched", plain_after, plain_before, 0.0)
    require_close(site, "both requests reach the site alike", before, plain_before, 0.05)
    require_close(site, "the edit equals the reference", after, reference(engine, compiled.sites[0], before), TOLERANCE)
    touched = min((*outcome_of(steered).moved, *outcome_of(steered).policy_moved))
    if touched != TOKENS:
        raise SelfTestFailed(f"{site}: an edit touched {touched} of {TOKENS} tokens")
    for watched, active in zip(watch, steered.features.activations.T, strict=True):
        encoded = engine.bundles[watched.row.bundle].sae.encode(before)[:, watched.row.latent]
        require_close(
            site,
            f"feature {watched.row.latent} equals the SAE's encode",
            torch.from_numpy(active.copy()),
            encoded,
            TOLERANCE,
        )


def canary_program(engine: Engine, site: str) -> program_pb2.Program:
    """Build a program that adds a fixed vector, and adds to some latents of each SAE at the site."""
    direction = np.random.default_rng(0).normal(size=engine.model.hidden_size).tolist()
    edits = [program_pb2.Edit(row=program_pb2.Row(vector=program_pb2.Vector(name="canary", values=direction)), add=1.0)]
    for name, dictionary in engine.registry.dictionaries.items():
        if dictionary.site == site and not dictionary.watched_only and not dictionary.whole_only:
            rows = map(feature_row, repeat(name), likely_latents(dictionary))
            edits += [program_pb2.Edit(row=row, add=1.0, unit=program_pb2.UNIT_RESIDUAL_NORM) for row in rows]
    return program_pb2.Program(sites=[program_pb2.SiteEdits(site=site, edits=edits)])


def feature_row(bundle: str, index: int) -> program_pb2.Row:
    """Return the row message of a latent."""
    return program_pb2.Row(feature=program_pb2.Feature(bundle=bundle, index=index))


def likely_latents(dictionary: Dictionary) -> list[int]:
    """Return the editable latents with the largest maximum activation: they are likely to be active."""
    editable = dictionary.decoder_norm > 0
    maximum = editable if dictionary.max_activation is None else dictionary.max_activation * editable
    latents: list[int] = np.argsort(-maximum.astype(np.float32), kind="stable")[:LATENTS].tolist()
    return latents


def outcome_of(output: Output) -> Outcome:
    """Return the outcome of a call's last output."""
    if output.outcome is None:
        raise SelfTestFailed("a canary did not end")
    return output.outcome


def residuals(output: Output, site: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the residuals [tokens, d] before and after the edits at a site."""
    captures = [c for c in outcome_of(output).captures if c.site == site]
    if not captures:
        raise SelfTestFailed(f"site {site}: its hook did not run")
    both = (
        np.concatenate([column(data, "<f4") for data in datas])
        for datas in ([c.before for c in captures], [c.after for c in captures])
    )
    before, after = (torch.from_numpy(flat).reshape(-1, width)[:TOKENS] for flat in both)
    return before, after


def reference(engine: Engine, site: wire.Site, x: Tensor) -> Tensor:
    """Compute the edited residuals of x [n, d] in plain PyTorch, with activations and decoders from the bundles."""
    activations, gains, decoders = zip(*(read_row(engine, row, x) for row in site.rows), strict=True)
    f, gain, decoder = torch.stack(activations, 1), torch.stack(gains, 1), torch.stack(decoders)
    places = list(range(len(site.rows)))
    edits = torch.from_numpy(edit_parameters(site, places, len(places), prompt=True)).expand(len(x), -1, -1)
    entry = torch.from_numpy(entry_parameters(site, places, prompt=True)).expand(len(x), -1)
    move, _ = edit(x, f, decoder, edits, entry, torch.ones(len(x), dtype=torch.bool), gain)
    return x + move


def read_row(engine: Engine, row: wire.Row, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (activations [n], input gains [n], decoder [d]) of one row on x [n, d]; a vector has activation 0."""
    ones = torch.ones(len(x))
    if row.bundle:
        sae = engine.bundles[row.bundle].sae
        gain = ones if sae.normalisation is Normalisation.NONE else input_gain(x, sae.normalisation)[:, 0]
        return sae.encode(x)[:, row.latent], gain, sae.decoder[row.latent].float()
    return 0 * ones, ones, torch.from_numpy(column(row.decoder, "<f4").copy())


def require_close(site: str, check: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise SelfTestFailed if the error exceeds `tolerance`, relative to the largest expected value."""
    error = float((ours - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    if not error <= tolerance:
        raise SelfTestFailed(f"{site}: {check}: off by {error:.2g} of the largest value, tolerance {tolerance:.2g}")
