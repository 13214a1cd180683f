"""Split the telemetry of a call between its readers: the client and the guards."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from rudder.server.engine.call import Call
from rudder.server.engine.telemetry.hub import Features, no_features
from rudder.server.program.watch import Watched

NO_FEATURES = no_features(0, 0, 0)


@dataclass(frozen=True)
class View:
    """The part of a call's telemetry that one reader gets.

    `empty`: the reader gets nothing. `columns`: its columns of the reported activations, None: all, in their order.
    `begin`: the first position that it gets. If one of its rows wants the prompt and another does not, the latter has
    activation 0 at prompt tokens: these are its columns `generated_only`, and `blank_top_k` for the top-k latents.
    `top_k`: strongest latents that it gets, of those that are not `hidden` at their site.
    """

    empty: bool
    columns: tuple[int, ...] | None
    begin: int
    prompt_tokens: int
    generated_only: tuple[int, ...]
    top_k: int
    blank_top_k: bool
    hidden: tuple[tuple[int, ...], ...] = ()

    def select(self, features: Features) -> Features:
        """Return this reader's part of `features`."""
        if self.empty:
            return NO_FEATURES
        part = features.between(self.begin, features.end) if features.first < self.begin else features
        part = part.reordered(self.columns)
        if not self.top_k:
            part = part._replace(top_latents=part.top_latents[:, :0], top_values=part.top_values[:, :0])
        elif any(self.hidden):
            part = self.without_hidden(part)
        if part.first < self.prompt_tokens and (self.generated_only or self.blank_top_k):
            part = self.without_prompt(part)
        return part

    def without_hidden(self, part: Features) -> Features:
        """Leave out the hidden latents, and keep the first `top_k` of the others."""
        hides = np.stack([np.isin(part.top_latents[:, i], latents) for i, latents in enumerate(self.hidden)], 1)
        order = hides.argsort(2, kind="stable")[:, :, : self.top_k]
        values = np.where(hides, 0.0, part.top_values).astype(part.top_values.dtype)
        latents, values = (np.take_along_axis(column, order, 2) for column in (part.top_latents, values))
        return part._replace(top_latents=latents, top_values=values)

    def without_prompt(self, part: Features) -> Features:
        """Set to 0 what is not reported at prompt tokens."""
        prompt = self.prompt_tokens - part.first
        activations, top_values = part.activations.copy(), part.top_values.copy()
        activations[:prompt, list(self.generated_only)] = 0.0
        if self.blank_top_k:
            top_values[:prompt] = 0.0
        return part._replace(activations=activations, top_values=top_values)


def views_of(call: Call, columns: Sequence[int]) -> tuple[View, View]:
    """Return the views of client and guards. `columns`: of each row of `call.watch`, then of `call.guard`."""
    total, own = len(set(columns)), len(call.watch)
    client = view(call, call.watch, columns[:own], total, top_k=call.top_k)
    return client, view(call, call.guard, columns[own:], total, top_k=0)


def view(call: Call, watched: Sequence[Watched], columns: Sequence[int], total: int, *, top_k: int) -> View:
    """Return the view of a reader with these watched rows, whose columns are among `total`."""
    prompt = [row.prompt for row in watched]
    reads_prompt = any(prompt) or (top_k > 0 and call.top_k_prompt)
    generated_only = compress(range(len(prompt)), [not wanted for wanted in prompt])
    return View(
        empty=not watched and not top_k,
        columns=None if tuple(columns) == tuple(range(total)) else tuple(columns),
        begin=0 if reads_prompt else call.prompt_tokens,
        prompt_tokens=call.prompt_tokens,
        generated_only=tuple(generated_only) if reads_prompt else (),
        top_k=top_k,
        blank_top_k=top_k > 0 and reads_prompt and not call.top_k_prompt,
        hidden=call.hidden if top_k else (),
    )
