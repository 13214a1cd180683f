"""Carry out all attacks, and report them."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from rudder.server.bench.redteam import door, engine, files, programs, prompts, white_box
from rudder.server.bench.redteam.attack import Attack, Result, carry_out
from rudder.server.bench.redteam.prompts import FORGET
from rudder.server.bench.redteam.target import Target, asked

GROUPS = (prompts, programs, engine, door, files, white_box)
ATTACKS: tuple[Attack, ...] = tuple(attack for group in GROUPS for attack in group.ATTACKS)
# Attacks of the threat model, and parts of them, that are not here. They count as neither passed nor failed.
NOT_BUILT = {
    "A2": "alarms of one caller counted over several requests: the server keeps no such count",
    "A4": "hard prompts by token search, with and without the guard's score; an ensemble with an outlier guard",
    "A8": "the guard of token ids, which no edit reaches, behind a caller who may blind the probe",
    "A10": "a search over a thousand programs: this one tries two dozen",
    "A12": "answers of an earlier turn, generated under another policy, as prompt of the next one",
    "A16": "grammars that allow nothing but continuations about the topic",
    "A17": "a term among eight samples: without the policy two of seventy questions have it, too few to tell;"
    " beam search: the contract has none",
    "A18": "speculative decoding: the server has no drafter",
    "A20": "lost telemetry: tests/unit/server/safety/test_loss.py",
    "A25": "translation: the demo model knows one language",
    "A26": "a policy replaced while a call runs: tests/engine/test_policy.py",
}


async def carried_out(target: Target, attacks: Sequence[Attack]) -> AsyncIterator[Result]:
    """Carry out attacks one after the other."""
    for attack in attacks:
        yield await carry_out(attack, target)


async def baseline(target: Target) -> dict[str, float]:
    """Return what the policy does when nobody attacks: knowledge in nats a token, and shares of prompts."""
    questions, benign = target.material.questions, list(target.material.benign)
    return {
        "knowledge": await target.plain(None, asked(questions)),
        "knowledge_with_policy": await target.plain(FORGET, asked(questions)),
        "missed": await target.missed(FORGET, [question.asked for question in questions]),
        "false_alarms": 1 - await target.missed(FORGET, benign),
    }


def report(figures: dict[str, float], results: Sequence[Result]) -> dict[str, Any]:
    """Return the JSON report."""
    return {
        "baseline": figures,
        "attacks": [result.document() for result in results],
        "held": sum(result.passed and result.outcome != "reported" for result in results),
        "failed": sum(not result.passed for result in results),
        # Without a bound: neither held nor failed.
        "reported": sum(result.passed and result.outcome == "reported" for result in results),
        "not_built": NOT_BUILT,
    }
