"""Select the latents of a topic: frequent on its texts, rare on all others, and less frequent on related texts.

Frequencies are shares of tokens on which a latent is active, as in Farrell et al. (arXiv 2410.19278). The ratio to the
neighbours is the filter of CRISP (arXiv 2508.13650); it excludes latents of vocabulary that the topic shares.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.activations.harvest import residuals
from rudder.sae_models.activations.hooks import Site
from rudder.sae_models.sae import SAE

# Added to the other books' frequency, so that a latent that is rare everywhere has no large ratio.
RARE = 1e-4


def book_frequencies(
    trunk: Any, site: Site, sae: SAE, windows: Windows, documents: Sequence[Document], books: Sequence[str]
) -> Tensor:
    """Return the frequency [books, F] of each latent on the windows of each book; 0 for a book without windows."""
    number = torch.tensor([books.index(documents[source].book) for source in windows.document.tolist()])
    active, tokens = torch.zeros(len(books), sae.latents), torch.zeros(len(books))
    start = 0
    for x, counted in residuals(trunk, site, windows):
        book = number[start : start + len(x)]
        fired = (sae.encode(x) > 0) & counted[..., None]
        active.index_add_(0, book, fired.sum(1).float())
        tokens.index_add_(0, book, counted.sum(1).float())
        start += len(x)
    return active / tokens.clamp(min=1)[:, None]


def select(
    frequency: Tensor,
    books: Sequence[str],
    target: Collection[str],
    neighbours: Collection[str],
    count: int,
    ceiling: float = 0.01,
    ratio: float = 3.0,
) -> list[int]:
    """Select up to `count` latents from frequencies [books, F], those most frequent on the target books first.

    Excludes latents whose mean frequency on the other books is `ceiling` or more, and those whose frequency on any
    neighbour, or that mean, exceeds 1 / ratio of that on the target. Without neighbours every other book counts as one.
    """
    forget = _mean(frequency, books, target)
    retain = _mean(frequency, books, set(books) - set(target))
    near = torch.stack([frequency[books.index(book)] for book in neighbours or set(books) - set(target)]).amax(0)
    eligible = (retain < ceiling) & (forget >= ratio * (torch.maximum(near, retain) + RARE))
    ranked = torch.where(eligible, forget, -1.0).argsort(descending=True)
    return [index for index in ranked[:count].tolist() if eligible[index]]


def _mean(frequency: Tensor, books: Sequence[str], chosen: Collection[str]) -> Tensor:
    return torch.stack([frequency[index] for index, book in enumerate(books) if book in chosen]).mean(0)
