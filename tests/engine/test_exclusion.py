"""Positions and tokens that a served SAE was not trained on are left out of edits, gates, reports and totals."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.hooks import hooked, parse_site
from rudder.server import config as configuration
from rudder.server.engine import selftest
from rudder.server.engine.call import Call, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.engine.telemetry.frame import PINNED
from rudder.server.program.compile import Compiled, compile_program
from rudder.server.program.watch import compile_watch
from rudder.v1 import program_pb2 as pb
from tests.engine.conftest import SMALL
from tests.engine.test_traps import SITE, greedy, outcome, prompt, push, run

BUNDLE = PRETRAINED / "textbook-lm-layers.2"
MODEL = PRETRAINED / "textbook-lm"
# The first template tokens, some in the middle, and one among the generated tokens of the calls below.
POSITIONS = (0, 1, 2, 40, 41, 88)
PROMPT, GENERATED = 80, 16
ENDS = PROMPT + GENERATED - 1
STRENGTH = 4.0


def direction(engine: Engine) -> list[float]:
    """Return the vector that the programs below add."""
    return [float(value) for value in np.random.default_rng(3).normal(size=engine.model.hidden_size)]


def excluded_token() -> int:
    """Return a token that occurs in the text of the prompts again and again."""
    ids = harvest.load_tokenizer(MODEL).encode(" cell", add_special_tokens=False)
    return int(ids[-1])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def excluding(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """Start an engine on a bundle that excludes positions and a token, and pass its self-test in both stages."""
    folder = tmp_path_factory.mktemp("excluding")
    shutil.copytree(BUNDLE, folder / "bundle")
    manifest: dict[str, Any] = json.loads((BUNDLE / "manifest.json").read_bytes())
    manifest["context"] = {"excluded_positions": POSITIONS, "excluded_tokens": [excluded_token()]}
    (folder / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    fields = {
        "engine.bundles": json.dumps([str(folder / "bundle")]),
        "policies.stages": "1",
        "watch": "[{index: 7}]",
    }
    started = await start_engine(configuration.load(None, SMALL | fields))
    await selftest.run(started)
    yield started
    await started.stop()


def adding(engine: Engine, gate: pb.Gate | None = None) -> Compiled:
    """Compile a program that adds a vector at the SAE's site."""
    edit = pb.Edit(row=pb.Row(vector=pb.Vector(name="v", values=direction(engine))), add=STRENGTH)
    return compile_program(pb.Program(sites=[pb.SiteEdits(site=SITE, edits=[edit])], gate=gate), engine.registry)


def as_program(compiled: Compiled, of_policy: bool) -> dict[str, Any]:
    """Run a program as that of a policy, or as a call's own."""
    return {"policies": (compiled,)} if of_policy else {"compiled": compiled}


def call_of(engine: Engine, **fields: Any) -> Call:
    """Build a call that reports everything at its prompt, too."""
    rows = [(SITE, pb.Row(feature=pb.Feature(index=index))) for index in (7, 8)]
    rows.append((SITE, pb.Row(probe=pb.Probe(name="one", weights=[1e-9] * engine.model.hidden_size, bias=1.0))))
    watch = compile_watch(rows, engine.registry, "watch", prompt=True)
    sampling = greedy(GENERATED, prompt_logprobs=1, logprobs=1)
    defaults: dict[str, Any] = {"watch": watch, "top_k": 5, "top_k_sites": (SITE,), "top_k_prompt": True}
    return Call(prompt(engine, PROMPT), sampling, capture=True, **(defaults | fields))


def counted_positions(call: Call) -> list[bool]:
    """Return, for each token that runs, whether it is not excluded."""
    excluded = {position for position, token in enumerate(call.prompt_ids) if token == excluded_token()}
    assert len(excluded - set(POSITIONS)) > 1
    return [position not in excluded and position not in POSITIONS for position in range(ENDS)]


def logprobs_of(outputs: Sequence[Output]) -> list[float]:
    """Return the log-probability of each token but the first."""
    of_prompt = [entry for output in outputs for entry in output.prompt_logprobs or () if entry]
    generated = [entry for output in outputs for entry in output.logprobs or ()]
    return [next(iter(entry.values())).logprob for entry in (*of_prompt, *generated)]


def reference_logprobs(engine: Engine, tokens: Sequence[int], counted: Sequence[bool]) -> list[float]:
    """Compute the same in transformers, the vector being added at counted positions."""
    model = harvest.load_model(MODEL)
    move = STRENGTH * torch.tensor(direction(engine)) * torch.tensor([*counted, False])[:, None]
    with torch.inference_mode(), hooked(model, parse_site(SITE), lambda x: x + move):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    chosen: list[float] = logits.float().log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].tolist()
    return chosen


def residuals(engine: Engine, outputs: Sequence[Output]) -> tuple[np.ndarray, np.ndarray]:
    """Return the residuals before and after the edits at the site."""
    captures = [c for c in outcome(list(outputs)).captures if engine.registry.layout.sites[c.site] == SITE]
    before, after = (
        np.concatenate([np.frombuffer(getattr(capture, name), "<f4") for capture in captures])
        .reshape(-1, engine.model.hidden_size)[:ENDS]
        for name in ("before", "after")
    )  # fmt: skip
    return before, after


@pytest.mark.parametrize("of_policy", [False, True])
async def test_edits_leave_out_excluded_tokens_and_equal_an_offline_reference(
    excluding: Engine, of_policy: bool
) -> None:
    call = call_of(excluding, **as_program(adding(excluding), of_policy))
    outputs = await run(excluding, call)
    counted = counted_positions(call)
    before, after = residuals(excluding, outputs)
    expected = np.array(counted)[:, None] * STRENGTH * np.array(direction(excluding))
    np.testing.assert_allclose(after - before, expected, atol=1e-3)
    last = outcome(outputs)
    assert (last.policy_moved[0] if of_policy else last.moved) == (sum(counted),)
    assert last.tokens_seen == ENDS
    tokens = [*call.prompt_ids, *(token for output in outputs for token in output.token_ids)]
    assert logprobs_of(outputs) == pytest.approx(reference_logprobs(excluding, tokens, counted), abs=2e-3)


async def test_reports_are_0_at_excluded_tokens(excluding: Engine) -> None:
    call = call_of(excluding)
    outputs = await run(excluding, call)
    counted = np.array(counted_positions(call))
    before, _ = residuals(excluding, outputs)
    encoded = next(iter(excluding.bundles.values())).sae.encode(torch.from_numpy(before.copy())).numpy()
    encoded *= counted[:, None]
    activations, top = (
        np.concatenate([getattr(output.features, name) for output in outputs]) for name in ("activations", "top_values")
    )
    np.testing.assert_allclose(activations[:, 2], counted, atol=1e-4)
    np.testing.assert_allclose(activations[:, :2], encoded[:, [7, 8]], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(top[:, 0], -np.sort(-encoded, 1)[:, :5], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("of_policy", [False, True])
async def test_gates_do_not_see_excluded_tokens_in_chunks_or_whole(excluding: Engine, of_policy: bool) -> None:
    """The prompt runs in one step, and then in chunks beside others."""
    score = pb.Row(probe=pb.Probe(name="one", weights=[1e-9] * excluding.model.hidden_size, bias=1.0))
    condition = pb.SequenceCondition(score=score, cusum=pb.Cusum(drift=0.5), level=10.2, latch=True)
    call = call_of(excluding, **as_program(adding(excluding, pb.Gate(site=SITE, sequence=condition)), of_policy))
    counted = sum(counted_positions(call))
    whole = await run(excluding, call)
    noise = [Call(prompt(excluding, 60 + 9 * n, n), greedy(12), push(excluding, 0.5, n)) for n in range(4)]
    results = await asyncio.gather(*(run(excluding, other) for other in (*noise, call, *noise)))
    for outputs in (whole, results[len(noise)]):
        last = outcome(outputs)
        # 0.5 a counted token: above 10.2 from the 21st on.
        assert (last.policy_moved[0] if of_policy else last.moved) == (counted - 20,)
        (gate,) = last.gates
        assert gate.open_tokens == counted - 20
        assert gate.statistic == pytest.approx(0.5 * counted, rel=1e-4)
    assert logprobs_of(results[len(noise)]) == pytest.approx(logprobs_of(whole), abs=1e-3)


async def test_totals_of_a_plain_call_leave_out_excluded_tokens(
    excluding: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: list[Any] = []
    monkeypatch.setattr(excluding.hub, "on_totals", totals.append)
    reported = call_of(excluding)
    outputs = await run(excluding, reported)
    expected = np.concatenate([output.features.activations[:, 0] for output in outputs]).sum()
    totals.clear()
    await run(excluding, Call(reported.prompt_ids, greedy(GENERATED), cache_salt="plain"))
    columns = dict(zip(PINNED, np.sum(totals, 0)[0].tolist(), strict=True))
    assert columns["tokens"] == sum(counted_positions(reported))
    assert columns["sum"] == pytest.approx(float(expected), rel=1e-3, abs=1e-3)


async def test_the_next_turn_does_not_reuse_tokens_that_may_have_been_edited(excluding: Engine) -> None:
    """A generated token is edited whatever its id; in the next turn's prompt, one of an excluded id is not."""
    call = Call(prompt(excluding, 250), greedy(20), adding(excluding))
    outputs = await run(excluding, call)
    answer = [token for output in outputs for token in output.token_ids]
    second = replace(call, prompt_ids=(*call.prompt_ids, *answer))
    assert outcome(await run(excluding, second)).cached_tokens == 0
    plain = replace(call, compiled=None)
    await run(excluding, plain)
    assert outcome(await run(excluding, replace(second, compiled=None))).cached_tokens > 0
