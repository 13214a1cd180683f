"""Texts drawn while directions are added: the displacement, equal random numbers, padding, and what texts are like."""

from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.hooks import captured, hooked, parse_site
from rudder.sae_models.analysis import sampling
from rudder.sae_models.analysis.crossing import Budgets
from rudder.sae_models.analysis.sampling import Steering, Texts, Voice, generate, likelihood, measured
from rudder.sae_models.bundle.manifest import Context
from rudder.sae_models.concepts import Point
from tests.unit import tiny

SITE = parse_site("layers.0.resid_post")
PROMPTS = ("The cell", "A king may rule the free people of a", "Peace")
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Voice:
    folder = tiny.save_model(tmp_path_factory.mktemp("model"))
    return Voice(harvest.load_model(folder), harvest.load_tokenizer(folder), tokens=6)


def steering(*doses: float, directions: int = 2) -> Steering:
    generator = torch.Generator().manual_seed(3)
    unit = torch.nn.functional.normalize(torch.randn(directions, 16, generator=generator), dim=1)
    return Steering(SITE, unit, torch.arange(len(doses)) % directions, torch.tensor(doses))


def residual(voice: Voice, ids: Tensor, steered: Steering | None = None) -> Tensor:
    """The residual stream at the site for whole texts [n, length] without padding."""
    with captured(voice.model, [SITE]) as vectors:
        voice.model(ids, use_cache=False)
    x = vectors[SITE]
    if steered is None:
        return x
    return steered.edit(sampling.editable(voice, ids, torch.ones_like(ids, dtype=torch.bool)))(x)


def test_displacement_is_a_share_of_the_norm_and_leaves_bos_alone(voice: Voice) -> None:
    ids, _ = sampling.encoded(["The cell", "The cell"], voice.tokenizer)
    given = steering(0.5, 2.0)
    x, moved = residual(voice, ids), residual(voice, ids, given)
    expected = x + given.dose[:, None, None] * x.norm(dim=-1, keepdim=True) * given.directions[given.which][:, None]
    assert torch.allclose(moved[:, 1:], expected[:, 1:], atol=1e-5)
    assert torch.equal(moved[:, 0], x[:, 0])


def test_excluded_positions_and_tokens_are_not_edited(voice: Voice) -> None:
    ids, mask = sampling.encoded(PROMPTS[:2], voice.tokenizer)
    context = Context(excluded_positions=(1,), excluded_tokens=(int(ids[1, 4]),))
    excluding = Voice(voice.model, voice.tokenizer, context=context)
    edited = sampling.editable(excluding, ids, mask)
    first = ids.shape[1] - mask.sum(1)
    assert not edited[0, : first[0] + 2].any()
    assert edited[0, first[0] + 2 :].all()
    assert edited[1].tolist() == [position > 1 and position != 4 for position in range(ids.shape[1])]


def test_dose_0_draws_the_unsteered_texts_and_another_dose_does_not(voice: Voice) -> None:
    plain = generate(voice, PROMPTS, SEEDS)
    assert torch.equal(plain.tokens, generate(voice, PROMPTS, SEEDS, steering(0.0, 0.0, 0.0)).tokens)
    assert not torch.equal(plain.tokens, generate(voice, PROMPTS, SEEDS, steering(2.0, 2.0, 2.0)).tokens)
    assert not torch.equal(plain.tokens, generate(voice, PROMPTS, (4, 5, 6)).tokens)


def test_a_text_does_not_depend_on_its_batch(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    given = steering(1.0, 0.5, 2.0)
    whole, likely = measured(voice, PROMPTS, SEEDS, given)
    monkeypatch.setattr(sampling, "BATCH", 1)
    for number in range(3):
        part = given.part(slice(number, number + 1))
        alone, own = measured(voice, PROMPTS[number : number + 1], SEEDS[number : number + 1], part)
        assert torch.equal(alone.tokens[0], whole.tokens[number])
        assert own.nats.item() == pytest.approx(likely.nats[number].item(), abs=1e-5)
        assert own.kl.item() == pytest.approx(likely.kl[number].item(), abs=1e-5)
    parts, in_parts = measured(voice, PROMPTS, SEEDS, given)
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.allclose(in_parts.kl, likely.kl, atol=1e-5)
    assert torch.equal(generate(voice, PROMPTS, SEEDS, given).tokens, whole.tokens)


@torch.no_grad()
def test_likelihood_is_that_of_the_plain_model_and_divergence_that_of_the_steered_one(voice: Voice) -> None:
    given = steering(1.5)
    texts, likely = measured(voice, PROMPTS[:1], SEEDS[:1], given)
    n = texts.tokens.shape[1]
    ids = torch.cat([texts.prompt, texts.tokens], 1)
    plain = voice.model(ids, use_cache=False).logits[:, -n - 1 : -1].log_softmax(-1)
    expected = -plain.gather(-1, texts.tokens[..., None]).mean()
    assert likely.nats.item() == pytest.approx(expected.item(), abs=1e-5)
    with hooked(voice.model, SITE, given.edit(sampling.editable(voice, ids, torch.ones_like(ids).bool()))):
        steered = voice.model(ids, use_cache=False).logits[:, -n - 1 : -1].log_softmax(-1)
    divergence = (steered.exp() * (steered - plain)).sum(-1).mean()
    assert likely.kl.item() == pytest.approx(divergence.item(), abs=1e-5)
    assert divergence > 1e-4
    assert likelihood(voice, texts).kl.item() == 0


def test_an_end_of_text_is_never_drawn(voice: Voice) -> None:
    logits = torch.full((2, 8192), -1e9)
    logits[:, voice.tokenizer.eos_token_id] = 1e9
    logits[:, 17] = 0
    assert sampling._drawn(voice, logits, torch.tensor([0.0, 0.999])).tolist() == [17, 17]


def test_draws_follow_the_distribution(voice: Voice) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, -1).clone()
    numbers = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokenizer: Any = type("Tokenizer", (), {"eos_token_id": None})
    drawn = sampling._drawn(Voice(voice.model, tokenizer, temperature=0.5), logits, numbers)
    expected = (logits[0] / 0.5).softmax(0)
    assert torch.allclose(drawn.bincount(minlength=4) / 20_000, expected, atol=0.01)


def test_repetition_and_distinct_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert sampling.repetition(tokens).tolist() == pytest.approx([0.2, 0.0])
    # 1 2, 2 3, 3 4, 4 1; and 4 5, 5 6, 6 7, 7 8 of the second: of 14.
    assert sampling.distinct(tokens) == pytest.approx(8 / 14)


def test_a_generator_of_one_token_is_rejected_though_its_perplexity_is_low(voice: Voice) -> None:
    """A model that expects a token again finds its repetition likely: the repetition budget rejects it."""
    plain = generate(voice, PROMPTS, SEEDS)
    tokens = torch.full((3, 64), 17)
    repeated = Texts(plain.prompt, plain.mask, tokens)

    def point(texts: Texts, nats: float) -> Point:
        share = float(sampling.repetition(texts.tokens).mean())
        return Point(0.1, exp(nats), share, sampling.distinct(texts.tokens), 0.0, 0.0)

    unsteered = point(plain, 4.0)
    assert Budgets().broken(point(repeated, 0.1), unsteered) == "repetition"
    assert not Budgets().broken(point(plain, 0.1), unsteered)
