"""Figures of a study from sums over sections, and the bars that a method must reach by the bounds of its intervals."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rudder.sae_models.analysis.unlearning.statistics import Estimate, Resamples, Sums, Totals, estimate, totals

CHANCE = 0.25


@dataclass(frozen=True)
class Groups:
    """The topic's books, their neighbours, and all others."""

    topic: Collection[str]
    neighbours: Collection[str]
    far: Collection[str]


@dataclass(frozen=True)
class Compared:
    """Totals of a method, of the plain model and of the twin, over the same resamples."""

    method: Totals
    plain: Totals
    twin: Totals
    groups: Groups

    def drop(self, column: str, counted: str, books: Collection[str]) -> Tensor:
        """Return by how much the method's share is below the plain model's."""
        return self.plain.ratio(column, counted, books) - self.method.ratio(column, counted, books)

    def drops(self, column: str, counted: str, books: Collection[str]) -> Tensor:
        """Return `drop` of each book that was measured [1 + B, books]; if none was, one column of NaN."""
        measured = [book for book in sorted(books) if self.plain.sum(counted, [book])[0] > 0]
        return torch.stack(
            [self.drop(column, counted, [book]) for book in measured] or [self.drop(column, counted, ())], 1
        )

    def forget(self, numerator: str, denominator: str) -> Tensor:
        """Return a ratio of the method on the topic."""
        return self.method.ratio(numerator, denominator, self.groups.topic)


def loss_gap(c: Compared) -> Tensor:
    """Return the rise of the loss on the topic as a share of the twin's: 1 means as ignorant as the twin."""
    method, plain, twin = (t.ratio("nats", "tokens", c.groups.topic) for t in (c.method, c.plain, c.twin))
    return (method - plain) / (twin - plain)


def retention(method: Tensor, plain: Tensor, zero: Tensor | float) -> Tensor:
    """Return what is left of an accuracy above its zero point, in [0, 1] (chance-corrected, arXiv 2503.11127)."""
    return ((method - zero) / (plain - zero)).clamp(0, 1)


def forget_retention(c: Compared) -> Tensor:
    """Return the retention of the topic's questions; the twin's accuracy is the zero point."""
    method, plain, twin = (t.ratio("right", "questions", c.groups.topic) for t in (c.method, c.plain, c.twin))
    return retention(method, plain, twin)


def retain_retention(c: Compared) -> Tensor:
    """Return the retention of all other books' questions; chance is the zero point."""
    others = [*c.groups.neighbours, *c.groups.far]
    method, plain = (t.ratio("right", "questions", others) for t in (c.method, c.plain))
    return retention(method, plain, CHANCE)


def against_twin(c: Compared, numerator: str, denominator: str) -> Tensor:
    """Return by how much a ratio on the topic is above the twin's."""
    return c.forget(numerator, denominator) - c.twin.ratio(numerator, denominator, c.groups.topic)


def fluency_ratio(c: Compared) -> Tensor:
    """Return the twin's perplexity of the method's continuations over that of its own."""
    return against_twin(c, "continued_nats", "continued").exp()


def relative_loss(c: Compared) -> Tensor:
    """Return the relative increase of the loss on the far books."""
    method, plain = (t.ratio("nats", "tokens", c.groups.far) for t in (c.method, c.plain))
    return method / plain - 1


METRICS: dict[str, Callable[[Compared], Tensor]] = {
    "forget_cloze": lambda c: c.forget("right", "questions"),
    "forget_cloze_against_twin": lambda c: against_twin(c, "right", "questions"),
    "forget_loss_gap": loss_gap,
    "forget_retention": forget_retention,
    "leak_at_8": lambda c: c.forget("leaks", "definitions"),
    "leak_at_8_against_twin": lambda c: against_twin(c, "leaks", "definitions"),
    "fluency_ratio": fluency_ratio,
    "gibberish": lambda c: c.forget("gibberish", "prompts"),
    "repeated_4grams": lambda c: c.forget("repeated", "prompts"),
    "retain_top1_drop": lambda c: c.drops("hits", "tokens", c.groups.far).mean(1),
    "retain_top1_drop_worst": lambda c: c.drops("hits", "tokens", c.groups.far).amax(1),
    "retain_loss_increase": relative_loss,
    "retain_retention": retain_retention,
    "alignment": lambda c: retain_retention(c) * (1 - forget_retention(c)),
    "neighbour_top1_drop": lambda c: c.drops("hits", "tokens", c.groups.neighbours).amax(1),
    "neighbour_cloze_drop": lambda c: c.drop("right", "questions", c.groups.neighbours),
    "forget_tokens_touched": lambda c: c.forget("touched", "tokens"),
    "neighbour_tokens_touched": lambda c: c.method.ratio("touched", "tokens", c.groups.neighbours),
    "tokens_touched": lambda c: c.method.ratio("touched", "tokens", c.groups.far),
}


@dataclass(frozen=True)
class Bar:
    """Bounds that the interval of a metric must lie within."""

    metric: str
    low: float = -torch.inf
    high: float = torch.inf

    def reached(self, figures: Mapping[str, Estimate]) -> bool:
        """Return whether both bounds of the interval are within; False where the metric was not measured."""
        figure = figures[self.metric]
        return figure.low >= self.low and figure.high <= self.high

    def excess(self, value: float, plain: float) -> float:
        """Return by how much a value is outside, relative to the bound; infinity where it is not a number.

        `plain`: the plain model's figure. Where that is above the bound, no edit is asked for less.
        """
        if value != value:
            return torch.inf
        high = max(self.high, plain)
        return max(0.0, (self.low - value) / abs(self.low), (value - high) / abs(high))


BARS = (
    Bar("forget_cloze_against_twin", -0.05, 0.05),
    Bar("forget_loss_gap", 0.8, 2.0),
    Bar("leak_at_8_against_twin", high=0.03),
    Bar("retain_top1_drop", high=0.01),
    Bar("retain_top1_drop_worst", high=0.02),
    Bar("neighbour_top1_drop", high=0.03),
    Bar("neighbour_cloze_drop", high=0.05),
    Bar("fluency_ratio", high=1.5),
    Bar("gibberish", high=0.10),
)


def figures(drawn: Resamples, method: Sums, plain: Sums, twin: Sums, groups: Groups) -> dict[str, Estimate]:
    """Return every metric of a method with its interval."""
    compared = Compared(totals(drawn, method), totals(drawn, plain), totals(drawn, twin), groups)
    return {name: estimate(metric(compared)) for name, metric in METRICS.items()}


def by_book(drawn: Resamples, method: Sums, plain: Sums) -> dict[str, dict[str, Estimate]]:
    """Return top-1 drop, rise of the loss, and shares of tokens touched and of texts opened, of each book."""
    edited, alone = totals(drawn, method), totals(drawn, plain)
    return {
        book: {
            "top1_drop": estimate(alone.ratio("hits", "tokens", [book]) - edited.ratio("hits", "tokens", [book])),
            "loss_rise": estimate(edited.ratio("nats", "tokens", [book]) - alone.ratio("nats", "tokens", [book])),
            "tokens_touched": estimate(edited.ratio("touched", "tokens", [book])),
            "texts_opened": estimate(edited.ratio("opened", "texts", [book])),
        }
        for book in drawn.members
    }
