"""Start-up self-test: nothing is served before each site's bank has done its arithmetic in the running engine."""

import asyncio
from itertools import repeat

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams

from rudder.sae_models.edit import edit
from rudder.sae_models.sae import Normalisation
from rudder.sae_models.sae import gain as input_gain
from rudder.server.engine.call import Call, Outcome, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.telemetry.frame import column
from rudder.server.engine.worker import bank
from rudder.server.program import wire
from rudder.server.program.compile import compile_program
from rudder.server.program.rows import Dictionary
from rudder.server.program.watch import compile_watch
from rudder.v1 import program_pb2

TOKENS = 12
LATENTS = 4
TOLERANCE = 1e-4


class SelfTestFailed(RuntimeError):
    """A site's bank does not do what the reference arithmetic says."""


async def run(engine: Engine) -> None:
    """Steer one of two equal requests in one batch and check both at every site. Raises SelfTestFailed."""
    try:
        for number, site in enumerate(engine.registry.layout.sites):
            for stage in range(engine.registry.layout.stages):
                await check_site(engine, number, site, stage)
    except SelfTestFailed:
        engine.metrics.self_test_failed()
        raise
    engine.self_tested = True


async def check_site(engine: Engine, number: int, site: str, stage: int) -> None:
    """Canary and neighbour at one site, in one stage."""
    program = canary(engine, site)
    compiled = compile_program(program, engine.registry, policy=True, field="self-test")
    prompt = tuple(range(3, 3 + TOKENS))
    readable = [d for d in engine.registry.dictionaries.values() if d.site == site and not d.whole_only]
    features = [(site, feature_row(d.name, latent)) for d in readable for latent in strongest_latents(d)]
    watch = compile_watch(features, engine.registry, "self-test")

    async def one(call: Call) -> Output:
        return [output async for output in engine.stream(call)][-1]

    params = SamplingParams(temperature=0.0, max_tokens=1)
    steered, plain = await asyncio.gather(
        one(Call(prompt, params, compiled, watch, report_prompt=True, capture=True, canary=stage)),
        one(Call(prompt, params, None, watch, report_prompt=True, capture=True, canary=stage)),
    )
    width = engine.model.hidden_size
    (before, after), (plain_before, plain_after) = residuals(steered, number, width), residuals(plain, number, width)
    agree(site, "an unsteered neighbour is untouched", plain_after, plain_before, 0.0)
    agree(site, "both requests reach the site alike", before, plain_before, 0.05)
    agree(site, "the edit equals the reference", after, reference(engine, compiled.sites[0], before), TOLERANCE)
    touched = min((*outcome_of(steered).moved, *outcome_of(steered).policy_moved))
    if touched != TOKENS:
        raise SelfTestFailed(f"{site}: an edit touched {touched} of {TOKENS} tokens")
    for (_, watched), active in zip(watch, steered.features.active.T, strict=True):
        encoded = engine.bundles[watched.bundle].sae.encode(before)[:, watched.latent]
        agree(
            site,
            f"feature {watched.latent} equals the SAE's encode",
            torch.from_numpy(active.copy()),
            encoded,
            TOLERANCE,
        )


def canary(engine: Engine, site: str) -> program_pb2.Program:
    """A push along a fixed vector, and a clamp without condition on some latents of each SAE at the site."""
    direction = np.random.default_rng(0).normal(size=engine.model.hidden_size).tolist()
    edits = [program_pb2.Edit(row=program_pb2.Row(vector=program_pb2.Vector(name="canary", values=direction)), add=1.0)]
    for name, dictionary in engine.registry.dictionaries.items():
        if dictionary.site == site and not dictionary.watched_only and not dictionary.whole_only:
            rows = map(feature_row, repeat(name), strongest_latents(dictionary))
            edits += [program_pb2.Edit(row=row, add=1.0, unit=program_pb2.UNIT_RESIDUAL_NORM) for row in rows]
    return program_pb2.Program(sites=[program_pb2.SiteEdits(site=site, edits=edits)])


def feature_row(bundle: str, index: int) -> program_pb2.Row:
    """The row of a latent."""
    return program_pb2.Row(feature=program_pb2.Feature(bundle=bundle, index=index))


def strongest_latents(dictionary: Dictionary) -> list[int]:
    """Latents that are likely to be active, and can be edited."""
    able = dictionary.decoder_norm > 0
    strength = able if dictionary.max_activation is None else dictionary.max_activation * able
    found: list[int] = np.argsort(-strength.astype(np.float32), kind="stable")[:LATENTS].tolist()
    return found


def outcome_of(output: Output) -> Outcome:
    """The outcome of a call's last output."""
    if output.outcome is None:
        raise SelfTestFailed("a canary did not end")
    return output.outcome


def residuals(output: Output, site: int, width: int) -> tuple[Tensor, Tensor]:
    """Residuals [tokens, d] before and after the edits at a site."""
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
    """The formula in plain PyTorch, on activations and decoders taken straight from the bundles."""
    read = [read_row(engine, row, x) for row in site.rows]
    f, gain = (torch.stack(column, 1) for column in list(zip(*read, strict=True))[:2])
    decoder = torch.stack([decoder for *_, decoder in read])
    places = list(range(len(read)))
    edits = bank.edit_parameters(site, places, len(read), prompt=True).expand(len(x), -1, -1)
    entry = bank.entry_parameters(site, places, prompt=True).expand(len(x), -1)
    move, _ = edit(x, f, decoder, edits, entry, torch.ones(len(x), dtype=torch.bool), gain)
    return x + move


def read_row(engine: Engine, row: wire.Row, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(activations [n], gains [n], decoder [d]) of one row on x [n, d]; a vector has no activation."""
    ones = torch.ones(len(x))
    if row.bundle:
        sae = engine.bundles[row.bundle].sae
        gain = ones if sae.normalisation is Normalisation.NONE else input_gain(x, sae.normalisation)[:, 0]
        return sae.encode(x)[:, row.latent], gain, sae.decoder[row.latent].float()
    return 0 * ones, ones, torch.from_numpy(column(row.decoder, "<f4").copy())


def agree(site: str, what: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise SelfTestFailed unless two tensors agree, relative to the larger one."""
    error = float((ours - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    if not error <= tolerance:
        raise SelfTestFailed(f"{site}: {what}: off by {error:.2g} of the largest value, tolerance {tolerance:.2g}")
