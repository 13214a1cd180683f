"""What each latent stands for: how often and how strongly it fires, on which words and books, and a label made from them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_models.bundle import Statistics
from sae_models.catalogue import Context, Latent, Summary
from sae_models.sae import SAE
from sae_models.training.corpus import Document, Windows
from sae_models.training.harvest import residuals
from sae_models.training.sites import Site

TOP_TOKENS = 10
TOP_CONTEXTS = 6
TOKENS_BEFORE = 16
TOKENS_AFTER = 8
LABEL_WORDS = 3
BOOK_SHARE = 0.3
INACTIVE = "(inactive)"


@dataclass
class Tally:
    """Sums over a pass through the corpus; F latents, V tokens, W words, B books, C contexts."""

    tokens: int
    active: Tensor
    strongest: Tensor
    total: Tensor
    norm: Tensor
    mass_of_token: Tensor
    mass_of_word: Tensor
    fired_in_book: Tensor
    tokens_of_book: Tensor
    peaks: Tensor
    peak_window: Tensor
    peak_position: Tensor


@dataclass(frozen=True)
class Words:
    """The vocabulary of whole words, lower case, and the word [n, length] that each token of the windows belongs to."""

    vocabulary: list[str]
    of_token: Tensor


def words_of(windows: Windows, tokenizer: Any) -> Words:
    """A word is a run of tokens of which only the first begins with a space or follows a non-letter."""
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    index: dict[str, int] = {"": 0}
    of_token = torch.zeros_like(windows.tokens)
    for row, ids in enumerate(windows.tokens.tolist()):
        for first, last in _runs([pieces[token] for token in ids]):
            word = _bare("".join(pieces[token] for token in ids[first:last]))
            of_token[row, first:last] = index.setdefault(word, len(index))
    return Words(list(index), of_token)


def _runs(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    first = 0
    for position in range(1, len(pieces) + 1):
        if position == len(pieces) or not (pieces[position][:1].isalpha() and pieces[position - 1][-1:].isalpha()):
            yield first, position
            first = position


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()


def tally(trunk: Any, site: Site, sae: SAE, windows: Windows, words: Words, book_of: Tensor) -> Tally:
    """One pass over the windows; `book_of` [documents] numbers each document's book."""
    sums = _zeros(sae, len(words.vocabulary), int(windows.tokens.max()) + 1, int(book_of.max()) + 1)
    start = 0
    for x, counted in tqdm(residuals(trunk, site, windows), total=-(-len(windows) // 32), unit="pass", desc="catalogue"):
        index = torch.arange(start, start + len(x))
        latents = sae.encode(x) * counted[..., None]
        _add_tokens(sums, x, latents, counted, windows.tokens[index], words.of_token[index], book_of[windows.document[index]])
        _add_peaks(sums, latents, index)
        start += len(x)
    return sums


def _zeros(sae: SAE, words: int, tokens: int, books: int) -> Tally:
    f, d = sae.latents, sae.width
    peaks = torch.zeros(TOP_CONTEXTS, f), torch.zeros(TOP_CONTEXTS, f, dtype=torch.long), torch.zeros(TOP_CONTEXTS, f, dtype=torch.long)
    sizes = (torch.zeros(f, n) for n in (tokens, words, books))
    return Tally(0, torch.zeros(f), torch.zeros(f), torch.zeros(d), torch.zeros(()), *sizes, torch.zeros(books), *peaks)


def _add_tokens(sums: Tally, x: Tensor, latents: Tensor, counted: Tensor, tokens: Tensor, words: Tensor, books: Tensor) -> None:
    window, position, latent = latents.nonzero(as_tuple=True)
    strength = latents[window, position, latent]
    sums.tokens += int(counted.sum())
    sums.active += (latents > 0).sum((0, 1))
    sums.strongest = torch.maximum(sums.strongest, latents.amax((0, 1)))
    sums.total += x[counted].sum(0)
    sums.norm += x[counted].norm(dim=1).sum()
    sums.mass_of_token.index_put_((latent, tokens[window, position]), strength, accumulate=True)
    sums.mass_of_word.index_put_((latent, words[window, position]), strength, accumulate=True)
    sums.fired_in_book.index_put_((latent, books[window]), torch.ones_like(strength), accumulate=True)
    sums.tokens_of_book.index_add_(0, books, counted.sum(1).float())


def _add_peaks(sums: Tally, latents: Tensor, index: Tensor) -> None:
    """Keeps the strongest windows of each latent, one place in each."""
    strength, position = latents.max(1)
    peaks = torch.cat([sums.peaks, strength])
    sums.peaks, order = peaks.topk(TOP_CONTEXTS, dim=0)
    sums.peak_window = torch.cat([sums.peak_window, index[:, None].expand_as(strength)]).gather(0, order)
    sums.peak_position = torch.cat([sums.peak_position, position]).gather(0, order)


def statistics_of(sums: Tally) -> Statistics:
    """The bundle's statistics of a pass."""
    return Statistics(sums.strongest, sums.active / sums.tokens, sums.total / sums.tokens, sums.norm / sums.tokens)


def describe(sums: Tally, windows: Windows, words: Words, documents: Sequence[Document], books: Sequence[str], tokenizer: Any) -> Iterator[Latent]:
    """Every latent's catalogue entry, in order."""
    rate = sums.fired_in_book / sums.tokens_of_book.clamp(min=1)
    share = rate / rate.sum(1, keepdim=True).clamp(min=1e-12)
    top_tokens, top_words = _strongest(sums.mass_of_token, TOP_TOKENS), _strongest(sums.mass_of_word, 4 * LABEL_WORDS)
    for index in range(len(sums.active)):
        label = label_of([words.vocabulary[word] for word in top_words[index]], dict(zip(books, share[index].tolist(), strict=True)))
        summary = Summary(index, label, float(sums.active[index] / sums.tokens), float(sums.strongest[index]))
        contexts = _contexts(sums, index, windows, documents, tokenizer)
        yield Latent(summary, tuple(tokenizer.decode([token]) for token in top_tokens[index]), contexts)


def _strongest(mass: Tensor, k: int) -> list[list[int]]:
    top = mass.topk(k, dim=1)
    return [np.array(ids)[np.array(values) > 0].tolist() for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def label_of(words: Sequence[str], share_of_book: dict[str, float]) -> str:
    """`virus, viral, viruses (microbiology)`: the words by activation mass, and the books that hold much of its firing.

    Shares are of the firing rate, so that long books do not win by length.
    """
    if not words:
        return INACTIVE
    spoken = [word for word in dict.fromkeys(words) if any(letter.isalnum() for letter in word)] or list(words)
    named = sorted((book for book, share in share_of_book.items() if share >= BOOK_SHARE), key=lambda book: -share_of_book[book])
    return ", ".join(spoken[:LABEL_WORDS]) + (f" ({', '.join(named)})" if named else "")


def _contexts(sums: Tally, index: int, windows: Windows, documents: Sequence[Document], tokenizer: Any) -> tuple[Context, ...]:
    places = zip(sums.peaks[:, index].tolist(), sums.peak_window[:, index].tolist(), sums.peak_position[:, index].tolist(), strict=True)
    return tuple(_context(windows, window, position, strength, documents, tokenizer) for strength, window, position in places if strength > 0)


def _context(windows: Windows, window: int, position: int, strength: float, documents: Sequence[Document], tokenizer: Any) -> Context:
    ids = windows.tokens[window][: int(windows.counted[window].nonzero().max()) + 1].tolist()
    before = ids[max(1, position - TOKENS_BEFORE) : position]
    after = ids[position + 1 : position + 1 + TOKENS_AFTER]
    text = (tokenizer.decode(part) for part in (before, [ids[position]], after))
    return Context(*text, activation=strength, source=documents[int(windows.document[window])].book)
