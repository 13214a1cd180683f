"""Measure the effect of a program by book: loss with and without it, and the share of tokens that it touches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.activations.harvest import residuals
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.analysis import program as programs
from rudder.sae_models.analysis.program import Program
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.evaluation.splicing import losses

# Nats per token: two models of the same recipe differ by less on data that both have seen (0.13 measured on a book).
MIN_DEFICIT = 0.2


class BookLoss(NamedTuple):
    """Figures of one book: number of counted tokens, loss in nats per token without (`plain`) and with (`edited`) the
    program, share of tokens touched, and the loss of the twin: the same model trained without the topic.
    """

    book: str
    tokens: int
    plain: float
    edited: float
    touched: float
    twin: float | None = None

    @property
    def gap(self) -> float | None:
        """Rise of the loss as a share of the twin's deficit: 1 means as ignorant as the twin.

        None without a twin, or where its deficit is not above MIN_DEFICIT.
        """
        deficit = 0.0 if self.twin is None else self.twin - self.plain
        return (self.edited - self.plain) / deficit if deficit > MIN_DEFICIT else None


def losses_by_book(
    model: Any,
    trunk: Any,
    bundle: Bundle,
    program: Program,
    windows: Windows,
    documents: Sequence[Document],
    plain: Tensor,
    twin: Tensor | None = None,
) -> list[BookLoss]:
    """Return the figures of each book, largest rise first.

    `plain` and `twin` are splicing.losses of the windows without a program. Only windows that the program touches run
    again: in all others the model's output cannot differ.
    """
    touched = touched_tokens(trunk, bundle, program, windows)
    hit = touched.any(1).nonzero().flatten()
    edited = plain.clone()
    if len(hit):
        site = parse_site(program.sites[0].site)
        edited[hit] = losses(model, windows.take(hit), site, lambda x, part: programs.apply(program, bundle, x, part).x)
    books = [_book_loss(book, chosen, plain, edited, touched, twin) for book, chosen in _by_book(windows, documents)]
    return sorted(books, key=lambda book: book.plain - book.edited)


def touched_tokens(trunk: Any, bundle: Bundle, program: Program, windows: Windows) -> Tensor:
    """Return the mask of tokens that the program touches [windows, length]."""
    passes = residuals(trunk, parse_site(bundle.manifest.site), windows)
    return torch.cat([programs.apply(program, bundle, x, counted).touched for x, counted in passes])


def _by_book(windows: Windows, documents: Sequence[Document]) -> list[tuple[str, Tensor]]:
    books = [documents[index].book for index in windows.document.tolist()]
    return [(book, torch.tensor([other == book for other in books])) for book in sorted(set(books))]


def _book_loss(
    book: str, chosen: Tensor, plain: Tensor, edited: Tensor, touched: Tensor, twin: Tensor | None
) -> BookLoss:
    nats, count = plain[chosen].double().sum(0).tolist()
    edited_nats, _ = edited[chosen].double().sum(0).tolist()
    twin_nats = None if twin is None else twin[chosen].double().sum(0).tolist()[0]
    # As of the loss, without the first token of a window.
    share = float(touched[chosen, 1:].sum()) / count
    twin_loss = None if twin_nats is None else twin_nats / count
    return BookLoss(book, int(count), nats / count, edited_nats / count, share, twin_loss)
