"""Labels of latents from a corpus, with scores: what a pass over text says of each latent, for the catalogue."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.bundle.catalogue import Context, Latent, Neighbour, Summary, split_words, stem
from rudder.sae_models.evaluation import activity, examples, label_score, logit_lens, terms
from rudder.sae_models.evaluation.activity import Sample, Tally
from rudder.sae_models.evaluation.examples import LABELLING, SCORING, Examples, Integers
from rudder.sae_models.evaluation.terms import Kind, Term, Text
from rudder.sae_models.sae import SAE

INACTIVE = "(inactive)"
# Contexts that a label is made from, contexts that it is scored on, as many as negatives, and those that are shown.
LABELLED, SCORED, SHOWN = 40, 40, 4
# Terms that name what the latent is about, so that adding it should raise their words.
TOPICAL = (Kind.WORD, Kind.NEAR, Kind.AFTER)


def describe(sums: Tally, sample: Sample, sae: SAE, unembedded: Tensor | None) -> list[Latent]:
    """Return every latent's catalogue entry, in order: activity, contexts, neighbours, label and its scores.

    `unembedded` [V, d]: the unembedding (logit_lens.unembedding); None where the SAE does not write to the residual
    stream of a causal language model: then there are no logit words and no interventions.
    """
    latents = with_neighbours(list(activity.describe(sums, sample)), sae.decoder)
    vocabulary = sample.windows.tokens[sample.windows.counted].unique()
    if unembedded is not None:
        words = logit_lens.words(sae.decoder, unembedded, vocabulary, sample.tokenizer)
        pairs = zip(latents, words, strict=True)
        latents = [replace(latent, promoted=raised, suppressed=lowered) for latent, (raised, lowered) in pairs]
    found = examples.examples_of(sums.activations, sample.windows, sae.latents)
    labelled = list(_labelled(latents, found, sample))
    latents = [latent for latent, _ in labelled]
    if unembedded is None:
        return latents
    names = tokens_of_words(vocabulary, sample)
    named = [topical_tokens(label, names) for _, label in labelled]
    areas = logit_lens.agreement(sae.decoder, unembedded, vocabulary, named)
    return [
        replace(latent, summary=replace(latent.summary, intervention=area))
        for latent, area in zip(latents, areas, strict=True)
    ]


def with_neighbours(latents: Sequence[Latent], decoder: Tensor) -> list[Latent]:
    """Return the latents with those whose decoder rows [F, d] are most similar."""
    index, cosine = (part.tolist() for part in examples.neighbours(decoder.flatten(1)))
    return [
        replace(latent, neighbours=tuple(map(Neighbour, *near)))
        for latent, *near in zip(latents, index, cosine, strict=True)
    ]


def _labelled(latents: Sequence[Latent], found: Examples, sample: Sample) -> Iterator[tuple[Latent, list[Term]]]:
    """Yield the latents with labels and scores, and the terms of each label."""
    text = Text(sample)
    for latent in tqdm(latents, unit="latent", desc="label"):
        index = latent.summary.index
        if not latent.summary.max_activation:
            yield replace(latent, summary=replace(latent.summary, label=INACTIVE)), []
            continue
        rng = np.random.default_rng(index)
        contexts = text.rows(found.active(index, LABELLING, LABELLED, rng))
        label = text.fit(contexts, [word.token for word in latent.promoted])
        held_out = found.active(index, SCORING, SCORED, rng)
        negative = found.inactive(index, [other.index for other in latent.neighbours], len(held_out), rng)
        scored = label_score.detection(text.fits(text.rows(held_out), label), text.fits(text.rows(negative), label))
        shown = tuple(_contexts(found, index, held_out[:SHOWN], sample))
        latent = replace(latent, contexts=(*latent.contexts, *shown), summary=_summary(latent.summary, label, scored))
        yield latent, label


def _summary(summary: Summary, label: Sequence[Term], scored: label_score.Detection | None) -> Summary:
    """Return a summary with a label, or without one where it is not above chance."""
    if scored is not None:
        summary = replace(summary, label_score=scored.area, label_error=scored.error)
    if not label or (scored is not None and not scored.above_chance):
        return summary
    return replace(summary, label=terms.label_text(label), origin=terms.origin(label))


def _contexts(found: Examples, latent: int, positions: Integers, sample: Sample) -> Iterator[Context]:
    for position, strength in zip(positions.tolist(), found.strength(latent, positions).tolist(), strict=True):
        context = activity.context_at(sample, position // found.length, position % found.length, strength)
        yield replace(context, held_out=True)


def tokens_of_words(vocabulary: Tensor, sample: Sample) -> dict[str, list[int]]:
    """Return the indices into a vocabulary [n] of the tokens that are a word, by its stem."""
    names = defaultdict[str, list[int]](list)
    for index, token in enumerate(vocabulary.tolist()):
        if len(words := split_words(sample.texts[token])) == 1:
            names[stem(words[0])].append(index)
    return names


def topical_tokens(label: Sequence[Term], names: dict[str, list[int]]) -> list[int]:
    """Return the tokens of `names` that are words of a label's topic."""
    stems = {stem(term.text) for term in label if term.kind in TOPICAL}
    return sorted(index for name in stems for index in names.get(name, ()))
