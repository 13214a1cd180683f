"""Intervals by a bootstrap over sections, the unit that texts of a corpus depend on one another in.

Every figure is a function of sums over sections. A resample draws sections with replacement within each book, so that
no book vanishes; all methods use the same resamples, so that their differences are paired. Intervals are percentiles
(clustered: Miller, arXiv 2411.00640).
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95


class Estimate(msgspec.Struct, frozen=True):
    """A figure with the bounds of its interval; all NaN where nothing was counted."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resamples:
    """How often each section counts: weights [1 + B, S], of which row 0 is the sample itself; `members`: the numbers of
    the sections of each book that were measured.
    """

    weights: Tensor
    members: Mapping[str, Tensor]


def resamples(books: Sequence[str], count: int = RESAMPLES, seed: int = 0, used: Tensor | None = None) -> Resamples:
    """Draw `count` resamples of sections, of which section s is in `books[s]`; of the `used` [S] ones, if given."""
    generator = torch.Generator().manual_seed(seed)
    sections = range(len(books)) if used is None else used.nonzero().flatten().tolist()
    numbers = defaultdict[str, list[int]](list)
    for section in sections:
        numbers[books[section]].append(section)
    members = {book: torch.tensor(own) for book, own in sorted(numbers.items())}
    weights = torch.zeros(1 + count, len(books), dtype=torch.float64)
    for own in members.values():
        weights[0, own] = 1
        drawn = own[torch.randint(len(own), (count, len(own)), generator=generator)]
        weights[1:].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return Resamples(weights, members)


@dataclass
class Sums:
    """Named sums of each section [S]."""

    sections: int
    columns: dict[str, Tensor] = field(default_factory=dict)

    def add(self, section: Tensor, **values: Tensor) -> None:
        """Add values [n] of texts to the sums of their sections [n]."""
        for name, value in values.items():
            column = self.columns.setdefault(name, torch.zeros(self.sections, dtype=torch.float64))
            column.index_add_(0, section, value.double())


@dataclass(frozen=True)
class Totals:
    """Sums of a method over the sections of each resample, by column and book [1 + B]."""

    drawn: Resamples
    columns: Mapping[str, Mapping[str, Tensor]]

    def sum(self, column: str, books: Collection[str]) -> Tensor:
        """Return a column's sum over books; NaN where it was not measured."""
        if column not in self.columns:
            return torch.full_like(self.drawn.weights[:, 0], torch.nan)
        measured = [self.columns[column][book] for book in books if book in self.drawn.members]
        return sum(measured, torch.zeros_like(self.drawn.weights[:, 0]))

    def ratio(self, numerator: str, denominator: str, books: Collection[str]) -> Tensor:
        """Return the ratio of two sums over books; NaN where the second is 0."""
        return self.sum(numerator, books) / self.sum(denominator, books)


def totals(drawn: Resamples, sums: Sums) -> Totals:
    """Sum over the sections of each resample."""
    names = list(sums.columns)
    table = torch.stack([sums.columns[name] for name in names], 1) if names else torch.zeros(sums.sections, 0).double()
    by_book = {book: drawn.weights[:, members] @ table[members] for book, members in drawn.members.items()}
    return Totals(drawn, {name: {book: by_book[book][:, n] for book in by_book} for n, name in enumerate(names)})


def estimate(values: Tensor) -> Estimate:
    """Return the figure of the sample, row 0 of [1 + B], with percentile bounds of the others."""
    drawn = values[1:][values[1:].isfinite()]
    if not values[0].isfinite() or not len(drawn):
        return Estimate(torch.nan, torch.nan, torch.nan)
    low, high = drawn.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=drawn.dtype)).tolist()
    return Estimate(float(values[0]), low, high)
