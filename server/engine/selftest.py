"""Start-up self-test: nothing is served before each site's bank has done its arithmetic in the running engine."""

import asyncio
from math import inf

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams

from rudder.v1 import program_pb2
from sae_models.formula import edit
from sae_models.sae import Rows, activations
from server.engine import bank
from server.engine.engine import Call, Engine, Outcome, Output
from server.engine.telemetry import column
from server.monitoring import metrics
from server.steering import wire
from server.steering.compile import compile_program
from server.steering.watch import compile_watch

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
        metrics.SELF_TEST_FAILURES.inc()
        raise
    engine.self_tested = True


async def check_site(engine: Engine, number: int, site: str, stage: int) -> None:
    """Canary and neighbour at one site, in one stage."""
    program = canary(engine, site)
    compiled = compile_program(program, engine.registry, policy=True, field="self-test")
    prompt = tuple(range(3, 3 + TOKENS))
    features = [(site, edit.row) for edit in program.sites[0].edits if edit.row.HasField("feature")]
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
        if dictionary.site == site:
            for index in np.argsort(-dictionary.max_activation)[:LATENTS].tolist():
                row = program_pb2.Row(feature=program_pb2.Feature(bundle=name, index=index))
                edits.append(program_pb2.Edit(row=row, add=1.0, unit=program_pb2.UNIT_RESIDUAL_NORM))
    return program_pb2.Program(sites=[program_pb2.SiteEdits(site=site, edits=edits)])


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
    """The bank's arithmetic in plain PyTorch, on rows taken straight from the bundles."""
    rows = [raw_rows(engine, row, x.shape[1]) for row in site.rows]
    stacked = Rows(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
    places = list(range(len(rows)))
    f = activations(x, stacked)
    edits = bank.edit_parameters(site, places, len(rows), prompt=True).expand(len(x), -1, -1)
    entry = bank.entry_parameters(site, places, prompt=True).expand(len(x), -1)
    move, _ = edit(x, f, stacked.decoder, edits, entry, torch.ones(len(x), dtype=torch.bool))
    return x + move


def raw_rows(engine: Engine, row: wire.Row, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(encoder, bias, threshold, decoder) of one row."""
    if row.bundle:
        rows = engine.bundles[row.bundle].sae.exact_rows(torch.tensor([row.latent]))
        return rows.encoder[0], rows.bias[0], rows.threshold[0], rows.decoder[0]
    decoder = torch.from_numpy(column(row.decoder, "<f4").copy())
    return torch.zeros(width), torch.tensor(0.0), torch.tensor(-inf), decoder


def agree(site: str, what: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise SelfTestFailed unless two tensors agree, relative to the larger one."""
    error = float((ours - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    if not error <= tolerance:
        raise SelfTestFailed(f"{site}: {what}: off by {error:.2g} of the largest value, tolerance {tolerance:.2g}")
