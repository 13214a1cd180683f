"""What each latent stands for: how often and how strongly it fires, on which words and books, and a label from them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.bundle.bundle import Statistics
from rudder.sae_models.bundle.catalogue import QUANTILES, Context, Latent, Summary
from rudder.sae_models.sae import SAE

TOP_TOKENS = 10
TOP_CONTEXTS = 6
TOKENS_BEFORE = 16
TOKENS_AFTER = 8
LABEL_WORDS = 3
BOOK_SHARE = 0.3
INACTIVE = "(inactive)"
ORIGIN = "corpus"
LOWEST_OCTAVE, OCTAVES, BINS_AN_OCTAVE = -20, 40, 8
BINS = OCTAVES * BINS_AN_OCTAVE
PAIRS_WAITING = 1 << 22
# Activations held at a time: 128 MB in float32.
ACTIVATIONS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Sample:
    """The text a catalogue is made from. `word` [n, length] is the word of `vocabulary` each token belongs to, and
    `book` [n] the book of `books` that each window is from."""

    windows: Windows
    tokenizer: Any
    vocabulary: list[str]
    word: Tensor
    books: list[str]
    book: Tensor


@dataclass
class Pairs:
    """Energy of (latent, other) pairs that occurred, `other` below `size`: `keys` are latent * size + other, in order.

    What came since they were last brought together waits in `new`: a table [F, size] would not fit in memory.
    """

    size: int
    keys: Tensor
    values: Tensor
    new: list[tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class Activity:
    """Sums over vectors: per latent [F] or [F, BINS], over what is read [d] or []."""

    tokens: int
    active: Tensor
    strongest: Tensor
    histogram: Tensor
    total: Tensor
    norm: Tensor


@dataclass(kw_only=True)
class Tally(Activity):
    """Of text also: by pairs of latent and token or word, per latent and book [F, books], and the strongest places of
    each latent [places, F]."""

    energy_of_token: Pairs
    energy_of_word: Pairs
    fired_in_book: Tensor
    tokens_of_book: Tensor
    peaks: Tensor
    peak_window: Tensor
    peak_position: Tensor


def sample_of(windows: Windows, documents: Sequence[Document], tokenizer: Any) -> Sample:
    """Finds the words and books of windows. A word is lower case and whole, however many tokens spell it."""
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    index: dict[str, int] = {"": 0}
    word = torch.zeros_like(windows.tokens)
    for row, ids in enumerate(windows.tokens.tolist()):
        for first, last in _runs([pieces[token] for token in ids]):
            text = re.sub(r"\s+", " ", "".join(pieces[token] for token in ids[first:last])).strip().lower()
            word[row, first:last] = index.setdefault(text, len(index))
    books = sorted({document.book for document in documents})
    book = torch.tensor([books.index(documents[source].book) for source in windows.document.tolist()])
    return Sample(windows, tokenizer, list(index), word, books, book)


def _runs(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    first = 0
    for position in range(1, len(pieces) + 1):
        if position == len(pieces) or not (pieces[position][:1].isalpha() and pieces[position - 1][-1:].isalpha()):
            yield first, position
            first = position


def tally_of(passes: Iterable[tuple[Tensor, Tensor]], sae: SAE, sample: Sample) -> Tally:
    """Of inputs [windows, length, d], with a router [windows, length, L, d], and counted, in the sample's order."""
    sums = _zeros(sae, sample)
    start = 0
    with tqdm(total=len(sample.windows), unit="window", desc="catalogue") as progress:
        for inputs, all_counted in passes:
            size = max(1, ACTIVATIONS_AT_ONCE // (sae.latents * inputs.shape[1]))
            for x, counted in zip(inputs.split(size), all_counted.split(size), strict=True):
                index = torch.arange(start, start + len(x))
                # The sums are the CPU's.
                x, counted, latents = x.cpu(), counted.cpu(), sae.encode(x).cpu()
                latents *= counted[..., None]
                add(sums, x[counted], latents[counted])
                _add_words(sums, latents, sample, index)
                _add_peaks(sums, latents, index)
                start += len(x)
                progress.update(len(x))
    _merge(sums.energy_of_token)
    _merge(sums.energy_of_word)
    return sums


def activity(sae: SAE, x: Tensor) -> Activity:
    """Of vectors [n, d], or [n, L, d] with a router."""
    sums = Activity(**_silence(sae))
    with tqdm(total=len(x), unit="vector", unit_scale=True, desc="catalogue") as progress:
        for part in x.split(max(1, ACTIVATIONS_AT_ONCE // sae.latents)):
            add(sums, part.cpu(), sae.encode(part).cpu())
            progress.update(len(part))
    return sums


def _silence(sae: SAE) -> dict[str, Any]:
    f = sae.latents
    return {
        "tokens": 0,
        "active": torch.zeros(f),
        "strongest": torch.zeros(f),
        "histogram": torch.zeros(f, BINS, dtype=torch.int32),
        "total": torch.zeros(sae.width),
        "norm": torch.zeros(()),
    }


def _zeros(sae: SAE, sample: Sample) -> Tally:
    f, books = sae.latents, len(sample.books)
    return Tally(
        **_silence(sae),
        energy_of_token=_no_pairs(len(sample.tokenizer)),
        energy_of_word=_no_pairs(len(sample.vocabulary)),
        fired_in_book=torch.zeros(f, books),
        tokens_of_book=torch.zeros(books),
        peaks=torch.zeros(TOP_CONTEXTS, f),
        peak_window=torch.zeros(TOP_CONTEXTS, f, dtype=torch.long),
        peak_position=torch.zeros(TOP_CONTEXTS, f, dtype=torch.long),
    )


def _no_pairs(size: int) -> Pairs:
    return Pairs(size, torch.zeros(0, dtype=torch.long), torch.zeros(0), [])


def add(sums: Activity, x: Tensor, latents: Tensor) -> None:
    """Counts vectors [n, d] or [n, L, d] and their activations [n, F]."""
    sums.tokens += len(x)
    # With a router, the mean over the sites that it chooses from.
    per_site = x.float().reshape(len(x), -1, x.shape[-1])
    sums.total += per_site.mean(1).sum(0)
    sums.norm += per_site.norm(dim=-1).mean(1).sum()
    sums.active += (latents > 0).sum(0)
    sums.strongest = torch.cat([sums.strongest[None], latents]).amax(0)
    token, latent = latents.nonzero(as_tuple=True)
    once = torch.ones_like(latent, dtype=torch.int32)
    sums.histogram.view(-1).index_add_(0, latent * BINS + bin_of(latents[token, latent]), once)


def _add_words(sums: Tally, latents: Tensor, sample: Sample, index: Tensor) -> None:
    window, position, latent = latents.nonzero(as_tuple=True)
    book, place = sample.book[index], (index[window], position)
    # Squares, because a latent's weak activations are many and say little.
    energy = latents[window, position, latent].square()
    _add_pairs(sums.energy_of_token, latent, sample.windows.tokens[place], energy)
    _add_pairs(sums.energy_of_word, latent, sample.word[place], energy)
    sums.fired_in_book.index_put_((latent, book[window]), torch.ones_like(energy), accumulate=True)
    sums.tokens_of_book.index_add_(0, book, sample.windows.counted[index].sum(1).float())


def _add_pairs(pairs: Pairs, latent: Tensor, other: Tensor, energy: Tensor) -> None:
    pairs.new.append((latent * pairs.size + other, energy))
    if sum(len(keys) for keys, _ in pairs.new) > max(PAIRS_WAITING, len(pairs.keys)):
        _merge(pairs)


def _merge(pairs: Pairs) -> None:
    keys = torch.cat([pairs.keys, *(keys for keys, _ in pairs.new)])
    values = torch.cat([pairs.values, *(values for _, values in pairs.new)])
    pairs.keys, place = keys.unique(return_inverse=True)
    pairs.values = torch.zeros(len(pairs.keys)).index_add_(0, place, values)
    pairs.new.clear()


def bin_of(activation: Tensor) -> Tensor:
    """The bin [n] of the histogram that each activation is in: eight an octave."""
    return ((activation.log2() - LOWEST_OCTAVE) * BINS_AN_OCTAVE).long().clamp(0, BINS - 1)


def _add_peaks(sums: Tally, latents: Tensor, index: Tensor) -> None:
    """Keeps the strongest windows of each latent, one place in each."""
    strength, position = latents.max(1)
    sums.peaks, order = torch.cat([sums.peaks, strength]).topk(TOP_CONTEXTS, dim=0)
    sums.peak_window = torch.cat([sums.peak_window, index[:, None].expand_as(strength)]).gather(0, order)
    sums.peak_position = torch.cat([sums.peak_position, position]).gather(0, order)


def statistics_of(sums: Activity) -> Statistics:
    """The bundle's statistics of a pass."""
    return Statistics(sums.strongest, sums.active / sums.tokens, sums.total / sums.tokens, sums.norm / sums.tokens)


def quantiles(histogram: Tensor, strongest: Tensor) -> Tensor:
    """Quantiles [F, q] of the activations that a histogram [F, BINS] counts, at most `strongest` [F]; 0 of none."""
    above, count = histogram.cumsum(1), histogram.sum(1, keepdim=True)
    wanted = count * torch.tensor(QUANTILES)
    place = torch.searchsorted(above.float(), wanted.contiguous()).clamp(max=BINS - 1)
    held = histogram.gather(1, place).clamp(min=1)
    share = ((wanted - (above.gather(1, place) - held)) / held).clamp(0, 1)
    value = torch.exp2((place + share) / BINS_AN_OCTAVE + LOWEST_OCTAVE)
    return torch.where(count > 0, torch.minimum(value, strongest[:, None]), 0.0)


def unnamed(sums: Activity) -> Iterator[Latent]:
    """Every latent's catalogue entry where there is no text to tell what it stands for: how it is active."""
    frequency, strongest = (sums.active / sums.tokens).tolist(), sums.strongest.tolist()
    levels = quantiles(sums.histogram, sums.strongest).tolist()
    for index, most in enumerate(strongest):
        summary = Summary(index, "", frequency[index], most)
        yield Latent(summary, (), (), tuple(levels[index]) if most > 0 else ())


def describe(sums: Tally, sample: Sample) -> Iterator[Latent]:
    """Every latent's catalogue entry, in order."""
    rate = sums.fired_in_book / sums.tokens_of_book.clamp(min=1)
    share = (rate / rate.sum(1, keepdim=True).clamp(min=1e-12)).tolist()
    frequency, strongest = (sums.active / sums.tokens).tolist(), sums.strongest.tolist()
    tokens = _strongest(sums.energy_of_token, len(frequency), TOP_TOKENS)
    words = _strongest(sums.energy_of_word, len(frequency), 4 * LABEL_WORDS)
    levels = quantiles(sums.histogram, sums.strongest).tolist()
    for index in range(len(frequency)):
        spoken = [sample.vocabulary[word] for word in words[index]]
        label = label_of(spoken, dict(zip(sample.books, share[index], strict=True)))
        summary = Summary(index, label, frequency[index], strongest[index], ORIGIN)
        top = tuple(sample.tokenizer.decode([token]) for token in tokens[index])
        spread = tuple(levels[index]) if strongest[index] > 0 else ()
        yield Latent(summary, top, tuple(_contexts(sums, index, sample)), spread)


def _strongest(pairs: Pairs, latents: int, k: int) -> list[list[int]]:
    """Of each latent, up to k others with the most energy, most first."""
    order = pairs.values.argsort(descending=True, stable=True)
    order = order[(pairs.keys[order] // pairs.size).argsort(stable=True)]
    latent, other = pairs.keys[order] // pairs.size, pairs.keys[order] % pairs.size
    begins = torch.searchsorted(latent, torch.arange(latents + 1)).tolist()
    return [other[begins[i] : min(begins[i] + k, begins[i + 1])].tolist() for i in range(latents)]


def label_of(words: Sequence[str], share_of_book: dict[str, float]) -> str:
    """`virus, viral, viruses (microbiology)`: the strongest words, and the books that hold much of the firing.

    Shares are of the firing rate, so that long books do not win by length.
    """
    if not words:
        return INACTIVE
    spoken = [word for word in dict.fromkeys(words) if any(letter.isalnum() for letter in word)] or list(words)
    named = sorted(
        (book for book in share_of_book if share_of_book[book] >= BOOK_SHARE), key=lambda b: -share_of_book[b]
    )
    return ", ".join(spoken[:LABEL_WORDS]) + (f" ({', '.join(named)})" if named else "")


def _contexts(sums: Tally, index: int, sample: Sample) -> Iterator[Context]:
    places = (sums.peaks[:, index], sums.peak_window[:, index], sums.peak_position[:, index])
    for strength, window, position in zip(*(place.tolist() for place in places), strict=True):
        if strength > 0:
            yield _context(sample, window, position, strength)


def _context(sample: Sample, window: int, position: int, strength: float) -> Context:
    ids = sample.windows.tokens[window][: int(sample.windows.counted[window].nonzero().max()) + 1].tolist()
    before = ids[max(1, position - TOKENS_BEFORE) : position]
    after = ids[position + 1 : position + 1 + TOKENS_AFTER]
    decode, book = sample.tokenizer.decode, sample.books[int(sample.book[window])]
    return Context(decode(before), decode([ids[position]]), decode(after), strength, book)
