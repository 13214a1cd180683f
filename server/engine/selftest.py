"""Start-up self-test: the engine serves only after the bank of each site edited correctly in the running model.

Canary requests exercise each site in each stage: edits of a prompt, of a decode step and of a prompt in chunks, blend,
norm restoration, displacement cap, gates on tokens and on the sequence, top-k latents, activations. What they report is
compared with the formula in plain PyTorch on the residuals that the bank captured, and these with the residual stream
as the model's own parts receive it (`worker/witness.py`).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudder.sae_models.edit import edit
from rudder.sae_models.errors import UserError
from rudder.sae_models.hookpoints import parse
from rudder.sae_models.sae import Normalisation
from rudder.sae_models.sae import gain as input_gain
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, Outcome, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.telemetry.frame import column
from rudder.server.program import wire
from rudder.server.program.compile import NOTHING, Compiled, compile_program
from rudder.server.program.parameters import edit_parameters, entry_parameters
from rudder.server.program.rows import Dictionary
from rudder.server.program.watch import Watched, compile_watch
from rudder.v1 import program_pb2

# Of a canary's prompt, excluded positions aside.
TOKENS = 12
LATENTS = 4
# Of the canary's moving average.
AVERAGE_DECAY = 0.3
TOLERANCE = 1e-4
# Of the residual stream, for the rounding of the model's dtype.
STREAM_TOLERANCE = 0.02
# Captured residuals of a chunked prompt at all sites; beyond this, its edits are counted and not compared.
CHUNKED_BYTES = 1 << 28
# Boundaries of the residual stream that a site writes or reads whole, as layers relative to its own.
BOUNDARIES = {"resid_pre": 0, "mlp_out": 1, "resid_post": 1}


class SelfTestFailed(UserError):
    """The bank of a site disagrees with the reference arithmetic."""


class Canary(NamedTuple):
    """A program that the self-test runs. `name`: what it exercises."""

    name: str
    compiled: Compiled


class Result(NamedTuple):
    """The outputs of a canary request, joined."""

    outcome: Outcome
    activations: Tensor
    top_latents: Tensor
    top_values: Tensor


async def run(engine: Engine) -> None:
    """Test every site in every stage, and mark the engine as self-tested. Raises SelfTestFailed."""
    try:
        for number, site in enumerate(engine.registry.layout.sites):
            for stage in range(engine.registry.layout.stages):
                await check_site(engine, number, site, stage)
        for stage in range(engine.registry.layout.stages):
            await check_chunks(engine, stage)
        await check_stream(engine)
    except SelfTestFailed:
        engine.metrics.self_test_failed()
        raise
    engine.self_tested = True


async def check_site(engine: Engine, number: int, site: str, stage: int) -> None:
    """Run canaries of one site in one stage beside an unsteered request in one batch, and check all of them."""
    addition = Canary("addition", compile_program(canary_program(engine, site), engine.registry, field="self-test"))
    readable = [d for d in engine.registry.dictionaries.values() if d.site == site and not d.whole_only]
    features = [(site, feature_row(d.name, latent)) for d in readable for latent in likely_latents(d)]
    watch = compile_watch(features, engine.registry, "self-test", prompt=True)
    plain_call = replace(short_call(engine), watch=watch)
    reads_top = any(is_read_whole(engine, d.name) for d in readable)
    top_call = replace(plain_call, top_k=LATENTS, top_k_sites=(site,), top_k_prompt=True) if reads_top else plain_call
    steered, plain = await run_together(engine, [with_program(plain_call, addition.compiled, stage), top_call])
    width = engine.model.hidden_size
    (before, _), (plain_before, plain_after) = residuals(steered, number, width), residuals(plain, number, width)
    require_close(site, "an unsteered neighbour is untouched", plain_after, plain_before, 0.0)
    length = canary_length(engine)
    require_close(site, "both requests reach the site alike", before[:length], plain_before[:length], 0.05)
    check_edits(engine, number, stage, addition, steered)
    check_activations(engine, site, watch, plain)
    check_activations(engine, site, watch, steered)
    if reads_top:
        check_top_k(engine, site, next(d for d in readable if is_read_whole(engine, d.name)), plain, plain_before)
    canaries = more_canaries(engine, site, plain_before[:length][counted_mask(engine, length)])
    calls = [with_program(short_call(engine), canary.compiled, stage) for canary in canaries]
    for canary, result in zip(canaries, await run_together(engine, calls), strict=True):
        check_edits(engine, number, stage, canary, result)


def short_call(engine: Engine) -> Call:
    """Build a call of a prompt and one decode step, the second generated token being not run, without a program."""
    # vLLM compiles its ranking of log-probabilities when they are first asked for, which would stall every stream then.
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=0)
    return Call(prompt_of(engine, canary_length(engine)), params, capture=True)


def canary_length(engine: Engine) -> int:
    """Return the length of a canary's prompt: it has TOKENS positions that are not excluded, and one in decoding."""
    positions = counted_mask(engine, engine.model.max_model_len - 1).nonzero().flatten()
    if len(positions) <= TOKENS:
        raise SelfTestFailed(f"the bundles exclude all but {len(positions)} of the positions of a context")
    return int(positions[TOKENS])


def counted_mask(engine: Engine, tokens: int) -> Tensor:
    """Return which of the first positions of a canary are not excluded, bool [tokens]."""
    return ~torch.isin(torch.arange(tokens), torch.tensor(engine.exclusion.positions, dtype=torch.long))


def prompt_of(engine: Engine, tokens: int) -> tuple[int, ...]:
    """Return token ids without BOS and excluded tokens, which no program edits."""
    unedited = {engine.model.bos_token_id, *engine.exclusion.tokens}
    ids = list(islice((i for i in range(3, engine.model.vocab_size) if i not in unedited), 512))
    return tuple(ids[n % len(ids)] for n in range(tokens))


def with_program(call: Call, compiled: Compiled, stage: int) -> Call:
    """Run a program as the request's own, or as that of a policy behind others of which nothing runs."""
    return replace(call, policies=(*[NOTHING] * (stage - 1), compiled)) if stage else replace(call, compiled=compiled)


def of_stage(stage: int) -> str:
    """Say whose edits those of a stage are."""
    return ("", " of a policy")[stage] if stage < 2 else f" of policy {stage}"


def touched(outcome: Outcome, stage: int) -> tuple[int, ...]:
    """Return the tokens that each edit of a stage touched."""
    return outcome.policy_moved[stage - 1] if stage else outcome.moved


async def run_together(engine: Engine, calls: Sequence[Call]) -> list[Result]:
    """Run calls in one batch, or one by one where the bank has no room for all of them."""
    layout = engine.registry.layout
    tokens = sum(len(call.prompt_ids) + 2 for call in calls)
    roomy = layout.slots >= len(calls) and layout.rows >= 16 and (layout.capture_tokens or tokens) >= tokens
    if roomy:
        return list(await asyncio.gather(*(result_of(engine, call) for call in calls)))
    return [await result_of(engine, call) for call in calls]


async def result_of(engine: Engine, call: Call) -> Result:
    """Run a call and join its outputs."""
    outputs = [output async for output in engine.stream(call)]
    columns = zip(*(output.features[1:] for output in outputs), strict=True)
    activations, latents, values = (torch.from_numpy(np.concatenate(column)) for column in columns)
    return Result(outcome_of(outputs[-1]), activations, latents, values)


def check_edits(engine: Engine, number: int, stage: int, canary: Canary, result: Result) -> None:
    """Check the edits of a canary at one site, and what is attested of them, against the reference."""
    site = engine.registry.layout.sites[number]
    before, after = residuals(result, number, engine.model.hidden_size)
    (part,) = (part for part in canary.compiled.sites if part.site == number)
    is_open = gate_reference(engine, part, before)
    expected = reference(engine, part, before, is_open)
    name, length = "" if canary.name == "addition" else f" ({canary.name})", canary_length(engine)
    for where, tokens in (("", slice(0, length)), (" in a decode step", slice(length, None))):
        check = f"the edit{of_stage(stage)} equals the reference{where}{name}"
        require_close(site, check, after[tokens], expected[tokens], TOLERANCE)
    outcome, opened = result.outcome, int(is_open.sum())
    counts = touched(outcome, stage)
    if set(counts) != {opened}:
        raise SelfTestFailed(f"{site}: an edit touched {min(counts, default=0)} of {opened} tokens{name}")
    for gate in outcome.gates if part.gate else ():
        if gate.open_tokens != opened:
            raise SelfTestFailed(f"{site}: a gate was open at {gate.open_tokens} tokens, not at {opened}{name}")


def check_activations(engine: Engine, site: str, watch: Sequence[Watched], result: Result) -> None:
    """Check the activations reported of watched latents against the SAE's encode."""
    for watched, active in zip(watch, result.activations.T, strict=True):
        before, _ = residuals(result, watched.site, engine.model.hidden_size)
        encoded = engine.bundles[watched.row.bundle].sae.encode(before)[:, watched.row.latent]
        encoded = torch.where(counted_mask(engine, len(before)), encoded, 0.0)
        require_close(site, f"feature {watched.row.latent} equals the SAE's encode", active, encoded, TOLERANCE)


def check_top_k(engine: Engine, site: str, dictionary: Dictionary, result: Result, before: Tensor) -> None:
    """Check the top-k latents of each token against the SAE's encode."""
    encoded = engine.bundles[dictionary.name].sae.encode(before)
    encoded = torch.where(counted_mask(engine, len(before))[:, None], encoded, 0.0)
    latents, values = result.top_latents[:, 0].long(), result.top_values[:, 0]
    require_close(site, "the top-k activations are the SAE's", values, encoded.topk(LATENTS).values, TOLERANCE)
    require_close(site, "the top-k latents have these activations", values, encoded.gather(1, latents), TOLERANCE)


def is_read_whole(engine: Engine, bundle: str) -> bool:
    """Return whether the top-k latents of a bundle are those of its encode of the site's residual alone."""
    return engine.bundles[bundle].sae.router is None and len(engine.bundles[bundle].manifest.sites) == 1


def more_canaries(engine: Engine, site: str, x: Tensor) -> list[Canary]:
    """Build programs of what an addition does not exercise, their gates such that x [n, d] opens and closes them."""
    add, push = edit_of(canary_vector(engine, 0), 1.0), edit_of(canary_vector(engine, 0), 3.0)
    blend = program_pb2.Blend(vector=canary_vector(engine, 1), weight=0.3)
    probe = program_pb2.Row(probe=program_pb2.Probe(name="canary", weights=canary_vector(engine, 2).values))
    scores = x.double() @ torch.tensor(canary_vector(engine, 2).values, dtype=torch.float64)
    averages = torch.stack([average_of(scores[: n + 1]) for n in range(len(scores))])
    trigger = program_pb2.Trigger(row=probe, above=middle(scores))
    sequence = program_pb2.SequenceCondition(
        score=probe, moving_average=program_pb2.MovingAverage(decay=AVERAGE_DECAY), level=middle(averages)
    )
    plain = program_pb2.SiteEdits(site=site, edits=[add])
    programs = {
        "blend and restored norm": program_pb2.Program(
            sites=[program_pb2.SiteEdits(site=site, edits=[add], blend=blend, restore_norm=True)]
        ),
        "displacement cap": program_pb2.Program(
            sites=[program_pb2.SiteEdits(site=site, edits=[push], max_displacement=0.05)]
        ),
        "token gate": program_pb2.Program(sites=[plain], gate=program_pb2.Gate(site=site, any_of=[trigger])),
    }
    if engine.registry.layout.keeps_sequences(site):
        gate = program_pb2.Gate(site=site, sequence=sequence)
        programs["sequence condition"] = program_pb2.Program(sites=[plain], gate=gate)
    return [Canary(n, compile_program(p, engine.registry, field="self-test")) for n, p in programs.items()]


def average_of(scores: Tensor) -> Tensor:
    """Return the moving average after the last of these scores."""
    average = torch.zeros((), dtype=torch.float64)
    for score in scores:
        average = (1 - AVERAGE_DECAY) * average + AVERAGE_DECAY * score
    return average


def middle(values: Tensor) -> float:
    """Return a level between the two middle values of a sample."""
    ordered = values.sort().values
    half = len(ordered) // 2
    return float(ordered[half - 1 : half + 1].mean())


def canary_vector(engine: Engine, seed: int) -> program_pb2.Vector:
    """Return a fixed random vector."""
    values = np.random.default_rng(seed).normal(size=engine.model.hidden_size).tolist()
    return program_pb2.Vector(name="canary", values=values)


def edit_of(vector: program_pb2.Vector, value: float) -> program_pb2.Edit:
    """Return an edit that adds a vector."""
    return program_pb2.Edit(row=program_pb2.Row(vector=vector), add=value)


async def check_chunks(engine: Engine, stage: int) -> None:
    """Check the edits at all sites of prompts that are longer than a step, or more than a step holds at once."""
    step, longest = engine.llm.vllm_config.scheduler_config.max_num_batched_tokens, engine.model.max_model_len - 2
    length = min(step + canary_length(engine), longest)
    layout, width = engine.registry.layout, engine.model.hidden_size
    add = edit_of(canary_vector(engine, 0), 1.0)
    sites = [program_pb2.SiteEdits(site=site, edits=[add]) for site in layout.sites]
    compiled = compile_program(program_pb2.Program(sites=sites), engine.registry, field="self-test")
    capture = length * width * 8 * len(sites) <= CHUNKED_BYTES and not layout.capture_tokens
    call = replace(short_call(engine), prompt_ids=prompt_of(engine, length), capture=capture)
    number = 1 if length > step else min(2 + step // length, layout.slots)
    for result in await run_together(engine, [with_program(call, compiled, stage)] * number):
        for part in compiled.sites if capture else ():
            before, after = residuals(result, part.site, width)
            expected = reference(engine, part, before, counted_mask(engine, len(before)))
            check = f"the edit{of_stage(stage)} equals the reference in a prompt in chunks"
            require_close(layout.sites[part.site], check, after, expected, TOLERANCE)
        counted = int(counted_mask(engine, length + 1).sum())
        for name, count in zip(compiled.edits, touched(result.outcome, stage), strict=True):
            if count != counted:
                problem = f"an edit touched {count} of {counted} tokens of a prompt in chunks"
                raise SelfTestFailed(f"{name.site}: {problem}")


async def check_stream(engine: Engine) -> None:
    """Compare what the banks read and write with the residual stream that the model's own parts receive."""
    width, unit = engine.model.hidden_size, program_pb2.UNIT_RESIDUAL_NORM
    row = program_pb2.Row(vector=canary_vector(engine, 0))
    for number, site in enumerate(engine.registry.layout.sites):
        layer, point = parse(site)
        if point not in BOUNDARIES:
            continue
        edits = program_pb2.SiteEdits(site=site, edits=[program_pb2.Edit(row=row, add=1.0, unit=unit)])
        compiled = compile_program(program_pb2.Program(sites=[edits]), engine.registry, field="self-test")
        boundary = layer + BOUNDARIES[point]
        await engine.llm.collective_rpc("rudder_witness", args=((boundary,),))
        plain, steered = await run_together(engine, [short_call(engine), with_program(short_call(engine), compiled, 0)])
        streams, *_ = await engine.llm.collective_rpc("rudder_witness", args=((),))
        x, y = (stream_of(streams, result, boundary, width) for result in (plain, steered))
        if not len(x):
            # No part of the model follows that reads the stream.
            continue
        (before, _), (steered_before, after) = residuals(plain, number, width), residuals(steered, number, width)
        if point != "mlp_out":
            check, scale = "it reads the residual stream of the model", largest(x)
            require_close(site, check, before / scale, x / scale, STREAM_TOLERANCE)
        if point != "resid_pre":
            # The decode steps may run different tokens.
            length = canary_length(engine)
            x, y, expected = x[:length], y[:length], (after - steered_before)[:length]
            error = y - x - expected
            # A large coordinate of the stream rounds a small displacement away.
            error = error.sign() * (error.abs() - STREAM_TOLERANCE * (x.abs() + y.abs())).clamp_min(0)
            check, scale = "the model goes on with the edited residual stream", largest(expected)
            require_close(site, check, (expected + error) / scale, expected / scale, STREAM_TOLERANCE)


def largest(x: Tensor) -> Tensor:
    """Return the largest absolute value of each token [n, 1]: some tokens are a hundred times as large as others."""
    return x.abs().amax(1, keepdim=True).clamp_min(1e-6)


def stream_of(streams: dict[tuple[int, int], bytes], result: Result, boundary: int, width: int) -> Tensor:
    """Return the residual stream [tokens, d] that was recorded of a request in front of layer `boundary`."""
    handle = result.outcome.captures[0].handle
    data = streams.get((handle, boundary), b"")
    return torch.from_numpy(column(data, "<f4").copy()).reshape(-1, width)[: result.outcome.tokens_seen]


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


def residuals(result: Result, site: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the residuals [tokens, d] before and after the edits at a site, of all tokens whose outputs are used."""
    captures = [c for c in result.outcome.captures if c.site == site]
    if not captures:
        raise SelfTestFailed(f"site {site}: its hook did not run")
    both = (
        np.concatenate([column(data, "<f4") for data in datas])
        for datas in ([c.before for c in captures], [c.after for c in captures])
    )
    computed = result.outcome.tokens_seen
    before, after = (torch.from_numpy(flat).reshape(-1, width)[:computed] for flat in both)
    return before, after


def reference(engine: Engine, site: wire.Site, x: Tensor, is_open: Tensor) -> Tensor:
    """Compute the edited residuals of x [n, d] in plain PyTorch, with activations and decoders from the bundles."""
    activations, gains, decoders = zip(*(read_row(engine, row, x) for row in site.rows), strict=True)
    f, gain, decoder = torch.stack(activations, 1), torch.stack(gains, 1), torch.stack(decoders)
    places = list(range(len(site.rows)))
    edits = torch.from_numpy(edit_parameters(site, places, len(places), prompt=True)).expand(len(x), -1, -1)
    entry = torch.from_numpy(entry_parameters(site, places, prompt=True)).expand(len(x), -1)
    move, _ = edit(x, f, decoder, edits, entry, is_open, gain)
    return x + move


def gate_reference(engine: Engine, site: wire.Site, x: Tensor) -> Tensor:
    """Evaluate the site's gate token by token on x [n, d]; open without one. Excluded positions are left out."""
    counted = counted_mask(engine, len(x))
    is_open = counted.clone()
    if site.gate is None:
        return is_open
    f = {row: read_row(engine, site.rows[row], x)[0] for row, _ in site.gate.triggers}
    if site.gate.triggers:
        is_open &= torch.stack([f[row] > above for row, above in site.gate.triggers]).any(0)
    if sequence := site.gate.sequence:
        state, scores = 0.0, read_row(engine, site.rows[sequence.score], x)[0]
        for token in counted.nonzero().flatten().tolist():
            score = float(scores[token])
            state = max(sequence.floor, sequence.decay * state + sequence.gain * score + sequence.offset)
            is_open[token] &= state > sequence.level
    return is_open


def read_row(engine: Engine, row: wire.Row, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (activations [n], input gains [n], decoder [d]) of one row on x [n, d]; a vector has activation 0."""
    ones = torch.ones(len(x))
    if row.bundle:
        sae = engine.bundles[row.bundle].sae
        gain = ones if sae.normalisation is Normalisation.NONE else input_gain(x, sae.normalisation)[:, 0]
        return sae.encode(x)[:, row.latent], gain, sae.decoder[row.latent].float()
    encoder, decoder = (
        torch.from_numpy(column(data, "<f4").copy()) if data else torch.zeros(x.shape[1])
        for data in (row.encoder, row.decoder)
    )
    score = x @ encoder + row.bias
    return torch.where(score > row.threshold, score, 0.0) if row.encoder else 0 * ones, ones, decoder


def require_close(site: str, check: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise SelfTestFailed if the error exceeds `tolerance`, relative to the largest expected value."""
    error = float((ours - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    if not error <= tolerance:
        raise SelfTestFailed(f"{site}: {check}: off by {error:.2g} of the largest value, tolerance {tolerance:.2g}")
