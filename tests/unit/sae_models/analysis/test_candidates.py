"""Rows for a topic: rankings by hand, groups of norm 1, and the output score by its definition."""

from collections.abc import Iterator

import pytest
import torch

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.activations.hooks import captured, hooked
from rudder.sae_models.analysis import candidates
from rudder.sae_models.analysis.candidates import Profile, Ranking, site_of
from rudder.sae_models.analysis.sampling import Voice
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.evaluation.logit_lens import unembedding
from tests.unit.tiny import TEXTBOOK_LM

DOCUMENTS = [
    Document("astronomy", "1", "A planet moves around its star, and a moon around its planet."),
    Document("biology", "2", "The cell has a membrane. A virus enters the cell of its host."),
    Document("biology", "3", "Bacteria divide; the cell wall grows."),
]


@pytest.fixture(scope="module")
def bundle() -> Iterator[Bundle]:
    opened = bundles.open_unverified(PRETRAINED / "textbook-lm-layers.2")
    yield opened
    opened.catalogue.close()


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice(harvest.load_model(TEXTBOOK_LM), harvest.load_tokenizer(TEXTBOOK_LM))


def test_pairs_rank_latents_that_are_active_with_the_topic_only() -> None:
    with_topic = torch.tensor([[2.0, 1.0, 0.0], [4.0, 1.0, 0.0], [0.0, 1.0, 0.0], [6.0, 0.0, 0.0]])
    without = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    assert candidates.by_pairs(with_topic, without) == Ranking((0, 1), (4.0, 1.0))


def profile() -> Profile:
    frequency = torch.tensor([[0.2, 0.1, 0.0, 0.5], [0.01, 0.0, 0.1, 0.5], [0.01, 0.02, 0.1, 0.5]])
    residual = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    return Profile(("a", "b", "c"), frequency, 10 * frequency, residual)


def test_contrast_ranks_by_frequency_and_weighs_by_the_rise_of_the_activation() -> None:
    assert candidates.by_contrast(profile(), "a").latents == (0, 1)
    assert candidates.by_contrast(profile(), "a").strength == pytest.approx((1.9, 0.9))
    assert candidates.by_contrast(profile(), "b").latents == ()
    assert candidates.by_contrast(profile(), "b", ignored=["c"]).latents == (2,)


def test_difference_of_means_is_a_unit_direction() -> None:
    assert profile().difference_of_means("a").tolist() == pytest.approx([0.6, 0.8])
    assert profile().rise("a", "b").tolist() == pytest.approx([1.9, 1.0, -1.0, 0.0])


def test_profile_counts_tokens_by_book(bundle: Bundle, voice: Voice) -> None:
    windows = corpus.windows(DOCUMENTS, voice.tokenizer, 16)
    found = candidates.profile_of(harvest.load_trunk(TEXTBOOK_LM, site_of(bundle)), bundle, windows, DOCUMENTS)
    assert found.books == ["astronomy", "biology"]
    with captured(voice.model, [site_of(bundle)]) as vectors:
        voice.model(windows.tokens, use_cache=False)
    own = torch.tensor([DOCUMENTS[i].book == "biology" for i in windows.document.tolist()])
    x = vectors[site_of(bundle)][own][windows.counted[own]]
    f = bundle.sae.encode(x)
    assert torch.allclose(found.frequency[1], (f > 0).float().mean(0), atol=1e-6)
    assert torch.allclose(found.activation[1], f.mean(0), rtol=1e-4, atol=1e-3)
    assert torch.allclose(found.residual[1], x.mean(0), rtol=1e-3, atol=1e-2)


def test_a_group_displaces_by_its_dose(bundle: Bundle) -> None:
    group = candidates.group_of("group", bundle, (3, 8, 12), (1.0, 2.0, 0.5))
    unit = torch.nn.functional.normalize(bundle.sae.decoder[[3, 8, 12]], dim=1)
    assert torch.allclose(torch.tensor(group.weights) @ unit, group.direction, atol=1e-6)
    assert group.direction.norm().item() == pytest.approx(1)
    assert group.weights[1] / group.weights[0] == pytest.approx(2)


def test_equal_groups_are_tried_once(bundle: Bundle) -> None:
    ranking = Ranking(tuple(range(10)), (1.0,) * 10)
    by_kind = {g.kind: g.latents for g in candidates.groups_of(bundle, ranking, dict(enumerate(range(10))))}
    assert by_kind == {
        "group": tuple(range(8)), "output-group": (9, 8, 7, 6, 5, 4, 3, 2), "input": (0,), "output": (9,),
    }  # fmt: skip
    few = candidates.groups_of(bundle, Ranking((4,), (1.0,)), {4: 0.5})
    assert [group.latents for group in few] == [(4,)]


def test_output_score_is_that_of_its_definition(bundle: Bundle, voice: Voice) -> None:
    latents = (5, 1876, 48)
    found = candidates.scores_of(voice, bundle, latents)
    ids = torch.tensor([voice.tokenizer("From my experience,").input_ids])
    for latent in latents:
        row = bundle.sae.decoder[latent]

        def add(x: torch.Tensor, row: torch.Tensor = row) -> torch.Tensor:
            x = x.clone()
            x[0, -1] += 10 * bundle.sae.encode(x[0, -1]).max() * row
            return x

        with hooked(voice.model, site_of(bundle), add):
            probability = voice.model(ids, use_cache=False).logits[0, -1].softmax(0)
        words = (unembedding(voice.model) @ row).topk(20).indices
        order = probability.argsort(descending=True).tolist()
        rank = min(order.index(int(word)) for word in words)
        expected = probability[words].max().item() * (1 - rank / len(probability))
        assert found.output[latent] == pytest.approx(expected, rel=1e-3)


def test_input_score_is_the_share_of_the_strongest_contexts(bundle: Bundle) -> None:
    strongest = [c.token.strip().lower() for c in bundle.catalogue.get(10).contexts if not c.held_out]
    assert candidates.input_score(bundle, 10, {"chapter"}) == strongest.count("chapter") / len(strongest) > 0
    assert candidates.input_score(bundle, 10, {"zebra"}) == 0


def test_a_label_ranks_latents_that_are_ever_active(bundle: Bundle) -> None:
    assert candidates.by_label(bundle, "planet").latents[0] == 1876
    assert candidates.by_label(bundle, "zyzzyva") == Ranking((), ())


def test_largest_activations_are_by_document(bundle: Bundle, voice: Voice) -> None:
    windows, trunk = corpus.windows(DOCUMENTS, voice.tokenizer, 6), harvest.load_trunk(TEXTBOOK_LM, site_of(bundle))
    found = candidates.largest_activations(trunk, bundle, windows.shuffled(1), len(DOCUMENTS))
    assert found.shape == (3, 4096)
    first = candidates.largest_activations(trunk, bundle, windows.where(windows.document == 0), 1)
    assert torch.allclose(found[0], first[0], rtol=1e-4, atol=1e-3)
    assert first.amax() > 0
