"""`worker_cls` with one fault at a time, by name: each must fail the self-test."""

from collections.abc import Callable
from typing import Any

import torch

from rudder.sae_models.operations import ENTRY, TOKEN
from rudder.server.engine.worker import bank, driver, hooks, reader
from rudder.server.engine.worker.cpu import Worker as CpuWorker

Fault = Callable[[Any, str], None]


def without(parameter: str, value: float) -> Fault:
    """A bank that ignores a parameter of its entries."""

    def install(patch: Any, _: str) -> None:
        edit = bank.bounded_edit  # type: ignore[attr-defined]

        def ignoring(x: Any, f: Any, decoder: Any, edits: Any, entry: Any, *rest: Any) -> Any:
            entry = entry.clone()
            entry[:, ENTRY.index(parameter)] = value
            return edit(x, f, decoder, edits, entry, *rest)

        patch(bank, "bounded_edit", ignoring)

    return install


def unedited(where: Callable[[Any], Any]) -> Fault:
    """A driver that gives the tokens that `where` selects from (step, positions) no entry."""

    def install(patch: Any, _: str) -> None:
        columns_of = driver.token_columns

        def columns(step: Any) -> Any:
            columns = columns_of(step)
            columns[TOKEN.index("entry"), where((step, columns[TOKEN.index("count")] - 1))] = 0
            return columns

        patch(driver, "token_columns", columns)

    return install


def repeated(lengths: Any, values: Any) -> Any:
    """Values of each request by token."""
    return values.repeat(lengths)


def generated(at: Any) -> Any:
    step, positions = at
    return positions >= repeated(step.lengths, step.batch.prompt)


def later_chunks(at: Any) -> Any:
    step, positions = at
    prompt, starts = (repeated(step.lengths, values) for values in (step.batch.prompt, step.starts))
    return (starts > 0) & (positions < prompt)


def open_gates(patch: Any, _: str) -> None:
    patch(bank.SiteBank, "gate", lambda _self, _stage, f, *_: torch.ones(len(f), dtype=torch.bool))


def open_conditions(patch: Any, _: str) -> None:
    condition = bank.SiteBank.condition

    def holding(*args: Any) -> Any:
        holds, *rest = condition(*args)
        return torch.ones_like(holds), *rest

    patch(bank.SiteBank, "condition", holding)


def no_policy(patch: Any, _: str) -> None:
    write = driver.Driver.write_entries

    def first_stage(self: Any, state: Any) -> None:
        write(self, state)
        for one in self.banks:
            one.edits[1].copy_(one.edits[1, :1].expand_as(one.edits[1]))

    patch(driver.Driver, "write_entries", first_stage)


def wrong_latents(patch: Any, _: str) -> None:
    strongest = reader.strongest

    def shifted(*args: Any) -> Any:
        latents, values = strongest(*args)
        return latents[:, ::-1].copy(), values

    patch(reader, "strongest", shifted)


def nothing_counted(patch: Any, _: str) -> None:
    filled = reader.Gather.filled
    patch(reader.Gather, "filled", lambda *args: 0 * values if (values := filled(*args)).dtype == bool else values)


def half_read(patch: Any, _: str) -> None:
    """A hook that reads the hidden states without the residual, as if they were the whole stream."""
    steered = hooks.steered
    patch(hooks, "steered", lambda one, hidden, _residual=None, scaled=False: steered(one, hidden, None, scaled))


def multiplied(patch: Any, _: str) -> None:
    """A model that multiplies what a branch adds to the stream, as Granite does."""
    steered = hooks.steered

    def multiplying(one: Any, hidden: Any, residual: Any = None, scaled: bool = False) -> Any:
        edited = steered(one, hidden, residual, scaled)
        return edited if residual is not None else hidden + 0.22 * (edited - hidden)

    patch(hooks, "steered", multiplying)


FAULTS: dict[str, Fault] = {
    "decode steps": unedited(generated),
    "chunks": unedited(later_chunks),
    "blend": without("weight", 0.0),
    "restored norm": without("restore", 0.0),
    "cap": without("cap", float("inf")),
    "gate": open_gates,
    "sequence": open_conditions,
    "policy": no_policy,
    "top-k": wrong_latents,
    "counts": nothing_counted,
    "half of the stream": half_read,
    "multiplier": multiplied,
}


class Worker(CpuWorker):
    """A worker that can be given a fault."""

    def rudder_fault(self, name: str) -> None:
        """Install a fault, in place of the last one; without a name there is none."""
        for owner, attribute, value in reversed(getattr(self, "undo", [])):
            setattr(owner, attribute, value)
        self.undo: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, attribute: str, value: Any) -> None:
            self.undo.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)

        if name:
            FAULTS[name](patch, name)
