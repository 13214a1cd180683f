"""Activity of latents over a corpus: frequency, activations, top tokens and the strongest contexts."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import token_text
from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.bundle.bundle import Statistics
from rudder.sae_models.bundle.catalogue import QUANTILES, Context, Latent, Summary
from rudder.sae_models.evaluation.examples import Activations
from rudder.sae_models.sae import SAE

TOP_TOKENS = 10
TOP_CONTEXTS = 4
TOKENS_BEFORE = 16
TOKENS_AFTER = 8
# The histogram of activations is logarithmic: 8 bins per octave, from 2^-20.
LOWEST_OCTAVE, OCTAVES, BINS_PER_OCTAVE = -20, 40, 8
BINS = OCTAVES * BINS_PER_OCTAVE
# Cap on pairs that wait in Pairs.new before they are merged.
PENDING_PAIRS = 1 << 22
# Cap on activations held at a time: 128 MB in float32.
ACTIVATIONS_PER_CHUNK = 1 << 25


@dataclass(frozen=True)
class Sample:
    """The text that a catalogue describes.

    `texts`: of each token of the tokenizer's vocabulary (token_text.vocabulary_texts). `word` [n, length]: index into
    `vocabulary` of the word that each token belongs to. `book` [n]: index into `books` of the book that each window is
    from.
    """

    windows: Windows
    tokenizer: Any
    texts: list[str]
    vocabulary: list[str]
    word: Tensor
    books: list[str]
    book: Tensor


@dataclass
class Pairs:
    """Energy, the sum of squared activations, of the (latent, other) pairs that occurred; 0 <= other < size.

    `keys`, sorted, are latent * size + other. `new` collects additions until they are merged. A sparse table, because
    a dense one [F, size] would not fit in memory.
    """

    size: int
    keys: Tensor
    values: Tensor
    new: list[tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class Activity:
    """Sums over vectors, per latent: count `active`, maximum, histogram [F, BINS]; of inputs: sum [d], norms []."""

    tokens: int
    active: Tensor
    max_activation: Tensor
    histogram: Tensor
    total: Tensor
    norm: Tensor


@dataclass(kw_only=True)
class Tally(Activity):
    """Sums over text: also energy per token, non-zero activations, and each latent's strongest contexts.

    `peaks`, `peak_window` and `peak_position` [TOP_CONTEXTS, F]: activation, window and position, strongest first.
    """

    energy_of_token: Pairs
    activations: Activations
    peaks: Tensor
    peak_window: Tensor
    peak_position: Tensor


def sample_of(windows: Windows, documents: Sequence[Document], tokenizer: Any) -> Sample:
    """Index the words and books of windows. A word is whole and lower case, however many tokens spell it."""
    texts = token_text.vocabulary_texts(tokenizer)
    index: dict[str, int] = {"": 0}
    word = torch.zeros_like(windows.tokens)
    for window, ids in enumerate(windows.tokens.tolist()):
        spans = token_text.spans_by_vocabulary(ids, texts, tokenizer)
        for first, last in _word_spans([span.text for span in spans]):
            text = re.sub(r"\s+", " ", "".join(span.text for span in spans[first:last])).strip().lower()
            word[window, spans[first].first : spans[last - 1].last] = index.setdefault(text, len(index))
    books = sorted({document.book for document in documents})
    book = torch.tensor([books.index(documents[source].book) for source in windows.document.tolist()])
    return Sample(windows, tokenizer, texts, list(index), word, books, book)


def _word_spans(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of maximal runs of tokens that continue one another letter to letter."""
    first = 0
    for position in range(1, len(pieces) + 1):
        if position == len(pieces) or not (pieces[position][:1].isalpha() and pieces[position - 1][-1:].isalpha()):
            yield first, position
            first = position


def tally_of(passes: Iterable[tuple[Tensor, Tensor]], sae: SAE, sample: Sample) -> Tally:
    """Sum over batches (inputs, counted) in the sample's order.

    Inputs [windows, length, d], with a router [windows, length, L, d]; counted [windows, length] marks tokens to use.
    """
    sums = _zeros(sae, sample)
    start = 0
    with tqdm(total=len(sample.windows), unit="window", desc="catalogue") as progress:
        for inputs, all_counted in passes:
            size = max(1, ACTIVATIONS_PER_CHUNK // (sae.latents * inputs.shape[1]))
            for x, counted in zip(inputs.split(size), all_counted.split(size), strict=True):
                index = torch.arange(start, start + len(x))
                # The sums are on the CPU, whatever device encodes.
                vectors = sae.encode(x[counted]).cpu()
                x, counted = x.cpu(), counted.cpu()
                latents = vectors.new_zeros(*counted.shape, sae.latents)
                latents[counted] = vectors
                _add_vectors(sums, x[counted], vectors)
                _add_tokens(sums, latents, sample, index)
                _add_peaks(sums, latents, index)
                start += len(x)
                progress.update(len(x))
    _merge(sums.energy_of_token)
    return sums


def activity(sae: SAE, x: Tensor) -> Activity:
    """Sum over vectors [n, d], with a router [n, L, d], that have no text."""
    sums = Activity(**_empty_sums(sae))
    with tqdm(total=len(x), unit="vector", unit_scale=True, desc="catalogue") as progress:
        for part in x.split(max(1, ACTIVATIONS_PER_CHUNK // sae.latents)):
            _add_vectors(sums, part.cpu(), sae.encode(part).cpu())
            progress.update(len(part))
    return sums


def _empty_sums(sae: SAE) -> dict[str, Any]:
    f = sae.latents
    return {
        "tokens": 0,
        "active": torch.zeros(f),
        "max_activation": torch.zeros(f),
        "histogram": torch.zeros(f, BINS, dtype=torch.int32),
        "total": torch.zeros(sae.width),
        "norm": torch.zeros(()),
    }


def _zeros(sae: SAE, sample: Sample) -> Tally:
    f = sae.latents
    return Tally(
        **_empty_sums(sae),
        energy_of_token=_no_pairs(len(sample.tokenizer)),
        activations=Activations(),
        peaks=torch.zeros(TOP_CONTEXTS, f),
        peak_window=torch.zeros(TOP_CONTEXTS, f, dtype=torch.long),
        peak_position=torch.zeros(TOP_CONTEXTS, f, dtype=torch.long),
    )


def _no_pairs(size: int) -> Pairs:
    return Pairs(size, torch.zeros(0, dtype=torch.long), torch.zeros(0), [])


def _add_vectors(sums: Activity, x: Tensor, latents: Tensor) -> None:
    """Add vectors [n, d] or [n, L, d] and their activations [n, F]."""
    sums.tokens += len(x)
    # With a router, average over the sites that it chooses from.
    per_site = x.float().reshape(len(x), -1, x.shape[-1])
    sums.total += per_site.mean(1).sum(0)
    sums.norm += per_site.norm(dim=-1).mean(1).sum()
    # Few activations are not zero: the one pass over all of them finds these.
    token, latent = latents.nonzero(as_tuple=True)
    activation = latents[token, latent]
    sums.active += torch.bincount(latent, minlength=len(sums.active))
    sums.max_activation.scatter_reduce_(0, latent, activation, "amax")
    sums.histogram.view(-1).index_add_(0, latent * BINS + bin_of(activation), torch.ones_like(latent).int())


def _add_tokens(sums: Tally, latents: Tensor, sample: Sample, index: Tensor) -> None:
    window, position, latent = latents.nonzero(as_tuple=True)
    # Squared, because a latent's many weak activations carry little information.
    activation = latents[window, position, latent]
    _add_pairs(sums.energy_of_token, latent, sample.windows.tokens[index[window], position], activation.square())
    sums.activations.add(len(index), latent, index[window] * sample.windows.tokens.shape[1] + position, activation)


def _add_pairs(pairs: Pairs, latent: Tensor, other: Tensor, energy: Tensor) -> None:
    pairs.new.append((latent * pairs.size + other, energy))
    if sum(len(keys) for keys, _ in pairs.new) > max(PENDING_PAIRS, len(pairs.keys)):
        _merge(pairs)


def _merge(pairs: Pairs) -> None:
    keys = torch.cat([pairs.keys, *(keys for keys, _ in pairs.new)])
    values = torch.cat([pairs.values, *(values for _, values in pairs.new)])
    pairs.keys, inverse = keys.unique(return_inverse=True)
    pairs.values = torch.zeros(len(pairs.keys)).index_add_(0, inverse, values)
    pairs.new.clear()


def bin_of(activation: Tensor) -> Tensor:
    """Return the histogram bin [n] of each activation."""
    return ((activation.log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE).long().clamp(0, BINS - 1)


def _add_peaks(sums: Tally, latents: Tensor, index: Tensor) -> None:
    """Update each latent's strongest contexts with one position, its maximum, of each window."""
    strength, position = latents.max(1)
    sums.peaks, order = torch.cat([sums.peaks, strength]).topk(TOP_CONTEXTS, dim=0)
    sums.peak_window = torch.cat([sums.peak_window, index[:, None].expand_as(strength)]).gather(0, order)
    sums.peak_position = torch.cat([sums.peak_position, position]).gather(0, order)


def statistics_of(sums: Activity) -> Statistics:
    """Return the bundle's statistics from the sums of a pass."""
    return Statistics(sums.max_activation, sums.active / sums.tokens, sums.total / sums.tokens, sums.norm / sums.tokens)


def quantiles(histogram: Tensor, max_activation: Tensor) -> Tensor:
    """Return quantiles [F, q] at QUANTILES of the non-zero activations that a histogram [F, BINS] counts.

    Interpolated within a bin and capped at the maximum activation [F]; 0 for a latent without any.
    """
    cumulative, count = histogram.cumsum(1), histogram.sum(1, keepdim=True)
    rank = count * torch.tensor(QUANTILES)
    index = torch.searchsorted(cumulative.float(), rank.contiguous()).clamp(max=BINS - 1)
    in_bin = histogram.gather(1, index).clamp(min=1)
    share = ((rank - (cumulative.gather(1, index) - in_bin)) / in_bin).clamp(0, 1)
    value = torch.exp2((index + share) / BINS_PER_OCTAVE + LOWEST_OCTAVE)
    return torch.where(count > 0, torch.minimum(value, max_activation[:, None]), 0.0)


def unlabelled(sums: Activity) -> Iterator[Latent]:
    """Yield every latent's catalogue entry, in order, where there is no text to label it from."""
    frequency, max_activation = (sums.active / sums.tokens).tolist(), sums.max_activation.tolist()
    levels = quantiles(sums.histogram, sums.max_activation).tolist()
    for index, maximum in enumerate(max_activation):
        summary = Summary(index, "", frequency[index], maximum)
        yield Latent(summary, (), (), tuple(levels[index]) if maximum > 0 else ())


def describe(sums: Tally, sample: Sample) -> Iterator[Latent]:
    """Yield every latent's catalogue entry, in order, without labels (labelling.py)."""
    frequency, max_activation = (sums.active / sums.tokens).tolist(), sums.max_activation.tolist()
    tokens = _top_others(sums.energy_of_token, len(frequency), TOP_TOKENS)
    levels = quantiles(sums.histogram, sums.max_activation).tolist()
    for index in range(len(frequency)):
        summary = Summary(index, "", frequency[index], max_activation[index])
        top = tuple(token_text.token_name(token, sample.tokenizer) for token in tokens[index])
        quantile = tuple(levels[index]) if max_activation[index] > 0 else ()
        yield Latent(summary, top, tuple(_contexts(sums, index, sample)), quantile)


def _top_others(pairs: Pairs, latents: int, k: int) -> list[list[int]]:
    """Return for each latent up to k others of its pairs, by energy, highest first."""
    # Sort by energy, then stably by latent: within a latent, pairs stay sorted by energy.
    order = pairs.values.argsort(descending=True, stable=True)
    order = order[(pairs.keys[order] // pairs.size).argsort(stable=True)]
    latent, other = pairs.keys[order] // pairs.size, pairs.keys[order] % pairs.size
    start = torch.searchsorted(latent, torch.arange(latents + 1)).tolist()
    return [other[start[i] : min(start[i] + k, start[i + 1])].tolist() for i in range(latents)]


def _contexts(sums: Tally, index: int, sample: Sample) -> Iterator[Context]:
    columns = (sums.peaks[:, index], sums.peak_window[:, index], sums.peak_position[:, index])
    for activation, window, position in zip(*(column.tolist() for column in columns), strict=True):
        if activation > 0:
            yield context_at(sample, window, position, activation)


def context_at(sample: Sample, window: int, position: int, activation: float) -> Context:
    """Return the text around a position, TOKENS_BEFORE tokens before it and TOKENS_AFTER after."""
    ids = sample.windows.tokens[window][: int(sample.windows.size[window])].tolist()
    # The leading BOS or CLS is no text.
    leading = 0 if sample.windows.counted[window, 0] else int(ids[0] in sample.tokenizer.all_special_ids)
    start = max(leading, position - TOKENS_BEFORE)
    around = max(leading, start - token_text.MAX_TOKENS_BEFORE)
    ids = ids[around : position + 1 + TOKENS_AFTER + token_text.MAX_TOKENS_BEFORE]
    parts = {"before": "", "token": "", "after": ""}
    for first, last, text in token_text.spans_by_vocabulary(ids, sample.texts, sample.tokenizer):
        if start <= around + first < position + 1 + TOKENS_AFTER:
            part = "before" if around + last <= position else "after" if around + first > position else "token"
            parts[part] += text
    source = sample.books[int(sample.book[window])]
    return Context(parts["before"], parts["token"], parts["after"], activation, source)
