"""What a program costs, book by book: loss in nats a token with and without it, and the share of tokens it touches."""

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
from rudder.sae_models.evaluation.splicing import behind_bos, losses

# Nats a token: two models of the same recipe differ by less than this on what both have seen (0.13 seen on a book).
LACKS = 0.2


class BookLoss(NamedTuple):
    """Of one book: counted tokens, nats a token without and with the program, share of tokens touched; nats a token of
    the twin, a model like this one that has never seen the topic.
    """

    book: str
    tokens: int
    plain: float
    edited: float
    touched: float
    twin: float | None = None

    @property
    def gap(self) -> float | None:
        """What the program takes away, as a share of what the twin lacks: 1 is as ignorant as the twin. None where the
        twin lacks nothing worth telling, or there is none.
        """
        lacks = 0.0 if self.twin is None else self.twin - self.plain
        return (self.edited - self.plain) / lacks if lacks > LACKS else None


def table(
    model: Any,
    trunk: Any,
    bundle: Bundle,
    program: Program,
    windows: Windows,
    documents: Sequence[Document],
    plain: Tensor,
    twin: Tensor | None = None,
) -> list[BookLoss]:
    """One row a book, most harmed first; `plain` and `twin` are metrics.losses of the windows without a program.

    Only windows that the program touches are run again: in all others the model's output cannot differ.
    """
    touched = touched_tokens(trunk, bundle, program, windows)
    hit = touched.any(1).nonzero().flatten()
    edited = plain.clone()
    if len(hit):
        edit = behind_bos(lambda x: programs.apply(program, bundle, x).x)
        edited[hit] = losses(model, windows.take(hit), parse_site(program.sites[0].site), edit)
    rows = [_row(book, chosen, plain, edited, touched, twin) for book, chosen in _by_book(windows, documents)]
    return sorted(rows, key=lambda row: row.plain - row.edited)


def touched_tokens(trunk: Any, bundle: Bundle, program: Program, windows: Windows) -> Tensor:
    """Which counted tokens behind BOS the program touches [windows, length - 1]."""
    site = parse_site(bundle.manifest.site)
    passes = residuals(trunk, site, windows)
    return torch.cat([programs.apply(program, bundle, x[:, 1:]).touched & counted[:, 1:] for x, counted in passes])


def _by_book(windows: Windows, documents: Sequence[Document]) -> list[tuple[str, Tensor]]:
    books = [documents[index].book for index in windows.document.tolist()]
    return [(book, torch.tensor([other == book for other in books])) for book in sorted(set(books))]


def _row(book: str, chosen: Tensor, plain: Tensor, edited: Tensor, touched: Tensor, twin: Tensor | None) -> BookLoss:
    count = int(plain[chosen, 1].sum())
    without, changed = (float(nats[chosen, 0].double().sum()) / count for nats in (plain, edited))
    never = None if twin is None else float(twin[chosen, 0].double().sum()) / count
    return BookLoss(book, count, without, changed, float(touched[chosen].sum()) / count, never)
