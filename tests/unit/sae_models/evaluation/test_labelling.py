"""Labels are of what latents are active on, made from one half of the documents and scored on the other."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.bundle.catalogue import Latent
from rudder.sae_models.evaluation import activity, examples, labelling, logit_lens
from rudder.sae_models.evaluation.activity import Sample, Tally
from rudder.sae_models.evaluation.examples import LABELLING, SCORING, Activations
from rudder.sae_models.evaluation.terms import Kind, Text, label_text, template_words
from rudder.sae_models.sae import SAE

WORDS = ("water", "people", "light", "money", "law", "war", "mind", "music", "food", "land")
VIRUS, THE, NOISE, ASTRONOMY, SILENT, OPPOSITE, AFTER_HOST = range(7)
LATENTS = 7


@dataclass(frozen=True)
class Planted:
    """A sample of random sentences, and the sums over activations that are known functions of its words."""

    sample: Sample
    sums: Tally
    sae: SAE
    activations: Tensor


def planted_activations(sample: Sample) -> Tensor:
    """Return activations [n, length, LATENTS]."""
    words = np.array(sample.vocabulary, dtype=object)[sample.word.numpy()]
    book = np.array(sample.books, dtype=object)[sample.book.numpy()][:, None] == "astronomy"
    random = np.random.default_rng(1).random((3, *words.shape))
    active = np.zeros((*words.shape, LATENTS), np.float32)
    active[..., VIRUS] = words == "virus"
    active[..., THE] = words == "the"
    active[..., NOISE] = random[0] < 0.05
    active[..., ASTRONOMY] = book & (random[1] < 0.2)
    # Active on a word in one half of the documents and on another word in the other: no label can hold.
    half = sample.windows.document.numpy()[:, None] % 2
    active[..., OPPOSITE] = np.where(half == LABELLING, words == "water", words == "money")
    active[:, 1:, AFTER_HOST] = (words[:, :-1] == "host") & (words[:, 1:] != "host")
    counted = sample.windows.counted[..., None].float()
    return torch.from_numpy(active) * counted * (1 + torch.from_numpy(random[2])[..., None].float())


@pytest.fixture(scope="module")
def planted() -> Planted:
    rng = np.random.default_rng(0)
    choices = [*WORDS, "virus", "host", "the"]
    documents = [
        Document("astronomy" if number % 3 == 0 else "history", str(number), " ".join(rng.choice(choices, 40)))
        for number in range(240)
    ]
    tokenizer = harvest.load_tokenizer(PRETRAINED / "textbook-lm")
    windows = corpus.windows(documents, tokenizer, 64)
    sample = activity.sample_of(windows, documents, tokenizer)
    activations = planted_activations(sample)
    identity = torch.eye(LATENTS)
    sae = SAE(identity, torch.zeros(LATENTS), torch.zeros(LATENTS), identity, torch.zeros(LATENTS))
    passes = zip(activations.split(50), windows.counted.split(50), strict=True)
    return Planted(sample, activity.tally_of(passes, sae, sample), sae, activations)


@pytest.fixture(scope="module")
def latents(planted: Planted) -> list[Latent]:
    return labelling.describe(planted.sums, planted.sample, planted.sae, None)


@pytest.mark.parametrize(
    ("latent", "label"),
    [(VIRUS, "virus"), (THE, "the"), (ASTRONOMY, "text of astronomy"), (AFTER_HOST, "after host")],
)
def test_label_names_what_a_latent_is_active_on(latents: list[Latent], latent: int, label: str) -> None:
    summary = latents[latent].summary
    assert summary.label == label
    assert summary.origin == "corpus"
    assert summary.label_score is not None
    assert summary.label_score > 0.75


@pytest.mark.parametrize("latent", [NOISE, OPPOSITE])
def test_label_that_held_out_contexts_do_not_bear_out_is_not_shown(latents: list[Latent], latent: int) -> None:
    summary = latents[latent].summary
    assert (summary.label, summary.origin) == ("", "")
    assert summary.label_score is not None
    assert summary.label_error is not None
    assert summary.label_score - summary.label_error <= 0.5


def test_inactive_latent_says_so_and_has_no_score(latents: list[Latent]) -> None:
    assert latents[SILENT].summary.label == labelling.INACTIVE
    assert latents[SILENT].summary.label_score is None
    assert latents[SILENT].contexts == ()


def test_contexts_mark_the_active_token_and_say_which_are_held_out(latents: list[Latent]) -> None:
    contexts = latents[VIRUS].contexts
    held_out = [context for context in contexts if context.held_out]
    assert len(held_out) == labelling.SHOWN
    assert len(contexts) == labelling.SHOWN + activity.TOP_CONTEXTS
    assert all("virus" in context.before[-5:] + context.token + context.after[:5] for context in held_out)
    assert all(1 <= context.activation <= 2 for context in contexts)


def test_neighbours_are_those_of_highest_cosine(latents: list[Latent]) -> None:
    decoder = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    index, cosine = examples.neighbours(decoder)
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    whole = (unit @ unit.T).fill_diagonal_(-1)
    assert torch.equal(index, whole.topk(examples.NEIGHBOURS).indices)
    assert torch.allclose(cosine, whole.topk(examples.NEIGHBOURS).values)
    assert len(latents[0].neighbours) == LATENTS - 1


def test_neighbours_in_chunks_and_of_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    whole = examples.neighbours(decoder)
    monkeypatch.setattr(examples, "COSINES_PER_CHUNK", 100)
    assert torch.equal(examples.neighbours(decoder)[0], whole[0])
    assert examples.neighbours(decoder[:1])[0].shape == (1, 0)


def test_examples_are_of_their_half_of_other_windows_and_active_or_not(planted: Planted) -> None:
    windows = planted.sample.windows
    found = examples.examples_of(planted.sums.activations, windows, LATENTS)
    flat, rng = planted.activations.flatten(0, 1), np.random.default_rng(0)
    for latent in (VIRUS, NOISE, OPPOSITE):
        for half in (LABELLING, SCORING):
            drawn = found.active(latent, half, 20, rng)
            assert len(np.unique(drawn // found.length)) == len(drawn) == 20
            assert (flat[drawn, latent] > 0).all()
            assert all(int(windows.document[w]) % 2 == half for w in drawn // found.length)
            assert found.strength(latent, drawn) == pytest.approx(flat[drawn, latent].numpy())
        negative = found.inactive(latent, [THE, AFTER_HOST], 20, rng)
        assert len(negative) == 20
        assert (flat[negative, latent] == 0).all()
        assert all(int(windows.document[w]) % 2 == SCORING for w in negative // found.length)
        hard = (flat[negative][:, [THE, AFTER_HOST]] > 0).any(1)
        assert hard.sum() >= 10


@pytest.mark.parametrize(("half", "share"), [(LABELLING, 81 / 82), (SCORING, 0.9)])
def test_stronger_activations_are_drawn_more_often(half: int, share: float) -> None:
    found = Activations()
    found.add(2, torch.zeros(4, dtype=torch.long), torch.arange(4), torch.tensor([1.0, 9.0, 1.0, 9.0]))
    counted = torch.ones(2, 2, dtype=torch.bool)
    windows = corpus.Windows(torch.zeros(2, 2), counted, torch.tensor([3, 8]), torch.tensor([2, 2]))
    drawn = examples.examples_of(found, windows, 1)
    rng = np.random.default_rng(0)
    strongest = [drawn.active(0, half, 1, rng)[0] % 2 for _ in range(2000)]
    assert np.mean(strongest) == pytest.approx(share, abs=0.025)


def test_activations_are_held_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_ENTRIES", 10)
    found = Activations()
    for _ in range(5):
        found.add(2, torch.zeros(6, dtype=torch.long), torch.arange(6), torch.ones(6))
    assert (found.windows, found.entries) == (4, 12)


def test_terms_of_a_position(planted: Planted) -> None:
    sample = planted.sample
    text = Text(sample)
    words = [sample.vocabulary[word] for word in sample.word[0].tolist()]
    position = next(i for i in range(20, 40) if words[i] != words[i - 1] and words[i + 1] != words[i])
    (row,) = text.rows(np.array([position]))
    kinds = {Kind(key // text.size): key % text.size for key in row[:7] if key >= 0}
    assert sample.vocabulary[kinds[Kind.WORD]] == words[position]
    assert sample.vocabulary[kinds[Kind.BEFORE]] == words[position - 1]
    assert sample.vocabulary[kinds[Kind.AFTER]] == words[position + 1]
    assert sample.books[kinds[Kind.SOURCE]] == "astronomy"
    near = {key % text.size for key in row[7:] if key >= 0}
    assert sample.vocabulary.index("the") not in near, "function words are near everything"
    (first,) = text.rows(np.array([1]))
    assert all(Kind(key // text.size) not in (Kind.BEFORE, Kind.NEAR) for key in first if key >= 0)


def test_word_after_counts_only_if_the_latent_promotes_it(planted: Planted) -> None:
    sample, text = planted.sample, Text(planted.sample)
    after = np.flatnonzero((sample.word.numpy()[:, 1:] == sample.vocabulary.index("music")).ravel())
    positions = after // (sample.word.shape[1] - 1) * sample.word.shape[1] + after % (sample.word.shape[1] - 1)
    rows = text.rows(positions[:40])
    assert label_text(text.fit(rows, [" music"])) == "before music"
    assert Kind.AFTER not in {term.kind for term in text.fit(rows, [" food"])}


def planted_text(text: str) -> tuple[Sample, Text]:
    """Return a sample of one document in one window, and its terms."""
    tokenizer = harvest.load_tokenizer(PRETRAINED / "textbook-lm")
    documents = [Document("", "1", text)]
    sample = activity.sample_of(corpus.windows(documents, tokenizer, 512), documents, tokenizer)
    return sample, Text(sample)


def label_where(holds: Callable[[str], bool], text: str) -> str:
    """Return the label of a latent that is active on the tokens whose text has a property."""
    sample, terms = planted_text(text)
    tokens = sample.windows.tokens[0].tolist()[: int(sample.windows.size[0])]
    positions = np.array([i for i, token in enumerate(tokens) if i and holds(sample.texts[token])])
    assert len(positions) >= 4
    return label_text(terms.fit(terms.rows(positions)))


PROSE = (
    "The cell of a Plant has walls in 17 of 250 cases.\nAnd so on, said Tom, with some water for all of us in 1999. "
    * 8
)


@pytest.mark.parametrize(
    ("holds", "label"),
    [
        (lambda text: text.strip().isdigit(), "a number"),
        (lambda text: text.strip() in (",", "."), "punctuation"),
        (lambda text: text == "\n", "line break"),
    ],
)
def test_shapes_are_named(holds: Callable[[str], bool], label: str) -> None:
    assert label in label_where(holds, PROSE)


def test_piece_of_words_is_named_with_words_that_have_it() -> None:
    sample, terms = planted_text("federalists and populists met strict statisticians on misty days of stone " * 8)
    words = [sample.vocabulary[word] for word in sample.word[0].tolist()]
    second = [i for i in range(2, len(words)) if words[i] == words[i - 1] == "statisticians" != words[i - 2]]
    piece = sample.texts[int(sample.windows.tokens[0, second[0]])]
    label = label_text(terms.fit(terms.rows(np.array(second))))
    assert f'"{piece}" in statisticians' in label or '" in statisticians' in label.partition("after")[2]


@pytest.mark.parametrize("text", ["a", "\n", "…", "1 2 3"])
def test_any_text_has_terms(text: str) -> None:
    _, terms = planted_text(text)
    assert terms.rows(np.array([0, 1])).shape == (2, 7 + 16)
    assert np.isfinite(np.log(terms.rate)).all()
    label_text(terms.fit(terms.rows(np.array([1, 1, 1, 1]))))


def test_words_of_the_chat_template_are_no_topic() -> None:
    tokenizer = harvest.load_tokenizer(PRETRAINED / "textbook-lm")
    turn = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %} You answer as assistant:"
    tokenizer.chat_template = turn
    assert {"user", "system", "assistant", "answer"} <= template_words(tokenizer)
    assert not template_words(tokenizer) & {"messages", "for", "x"}
    documents = [Document("", str(i), "user system assistant planet " * 9) for i in range(4)]
    sample = activity.sample_of(corpus.windows(documents, tokenizer, 64), documents, tokenizer)
    terms = Text(sample)
    near = terms.rows(np.array([40]))[0, 7:]
    assert {sample.vocabulary[key % terms.size] for key in near if key >= 0} == {"planet"}


def test_label_of_no_contexts_is_empty(planted: Planted) -> None:
    text = Text(planted.sample)
    terms = text.fit(text.rows(np.zeros(0, np.int64)))
    assert terms == []
    assert label_text(terms) == ""
    assert text.fits(text.rows(np.array([3])), terms).tolist() == [0]


def test_text_without_sources_and_a_single_document_gives_labels_without_scores() -> None:
    tokenizer = harvest.load_tokenizer(PRETRAINED / "textbook-lm")
    documents = [
        next(d for d in (Document("", str(i), "the virus of a host " * 20) for i in range(9)) if d.fold % 2 == 0)
    ]
    windows = corpus.windows(documents, tokenizer, 16)
    sample = activity.sample_of(windows, documents, tokenizer)
    active = (sample.word == sample.vocabulary.index("virus"))[..., None].float()
    sae = SAE(torch.eye(1), torch.zeros(1), torch.zeros(1), torch.eye(1), torch.zeros(1))
    sums = activity.tally_of([(active, windows.counted)], sae, sample)
    (latent,) = labelling.describe(sums, sample, sae, None)
    assert latent.summary.label_score is None
    assert latent.neighbours == ()


def test_agreement_is_the_area_of_the_named_tokens() -> None:
    unembedded = torch.diag(torch.arange(6.0))
    decoder = torch.ones(3, 6)
    areas = list(logit_lens.agreement(decoder, unembedded, torch.arange(6), [[5], [0], []]))
    assert areas == [1.0, 0.0, None]
