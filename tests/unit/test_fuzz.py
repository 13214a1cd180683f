"""The fuzzer: its corpus and some hundred drawn messages through decoding and admission; and that it can fail."""

import asyncio
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import pytest

from rudder.server import failpoints
from rudder.server.service import limits
from rudder.server.service.errors import REASONS
from rudder.server.service.serving import Serving
from rudder.v1 import inference_pb2
from tests.fuzz import process
from tests.fuzz.cases import Case, corpus, drawn, line_of, methods
from tests.fuzz.messages import MUTATIONS, Messages


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    started = process.serving_without_engine()
    yield started
    started.tokenizers.shutdown()


async def test_corpus_and_drawn_messages_end_with_a_reason(serving: Serving) -> None:
    result = await process.run(serving, drawn(5, 400, process.known_values(serving)))
    assert [line_of(case) for case in result.crashes] == []
    assert not any(result.held.values())
    assert set(result.outcomes) <= {"OK", *REASONS}
    # Many reach the bank; a fuzzer whose messages are all refused at the first field finds nothing.
    assert result.outcomes["OK"] > 80


async def test_a_planted_crash_is_found(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    check = limits.check

    def careless(request: object, bounds: limits.Bounds) -> None:
        assert not getattr(request, "cache_salt", "").startswith("x" * 300)
        check(request, bounds)  # type: ignore[arg-type]

    monkeypatch.setattr(limits, "check", careless)
    result = await process.run(serving, drawn(5, 400, process.known_values(serving)))
    assert result.crashes
    assert not result.passed
    assert result.outcomes["INTERNAL"] == len(result.crashes)


async def test_a_lease_that_is_not_given_back_is_found(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in drawn(5, 400, process.known_values(serving)) if case.method.name.endswith("Complete"))
    request = inference_pb2.CompleteRequest(prompt=inference_pb2.Prompt(text="a"))
    monkeypatch.setattr(serving.engine.admission, "release", lambda _: None)
    result = await process.run(serving, [Case(case.method, request.SerializeToString())])
    monkeypatch.undo()
    assert (result.held["leases"], result.passed) == (1, False)
    (handle,) = serving.engine.admission.callers
    serving.engine.admission.release(handle)


async def test_a_call_that_hangs_is_found(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SLOW_S", 0.05)

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setitem(process.HANDLERS, "ModelService.Get", hang)
    case = next(Case(method, b"") for method in methods() if method.name == "ModelService.Get")
    assert (await process.run(serving, [case])).outcomes == {"SLOW": 1}
    assert failpoints.FILE is None


def test_cases_are_those_of_their_seed() -> None:
    def lines(seed: int) -> list[str]:
        return [line_of(case) for case in islice(drawn(seed, 60, {}), len(corpus()), None)]

    assert lines(1) == lines(1)
    assert lines(1) != lines(2)


def test_every_method_has_a_handler() -> None:
    assert {method.name for method in methods()} == process.HANDLERS.keys()


def test_drawn_messages_reach_every_field() -> None:
    messages, seen = Messages(Random(3), {}), set()
    for _ in range(300):
        message: Any = messages.draw(inference_pb2.GenerateRequest)
        seen |= {field.name for field, _ in message.ListFields()}
        if message.HasField("sampling"):
            seen |= {field.name for field, _ in message.sampling.ListFields()}
    expected = {
        *inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name,
        *inference_pb2.Sampling.DESCRIPTOR.fields_by_name,
    }
    assert seen >= expected


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_take_any_bytes(mutation: object) -> None:
    for seed in range(50):
        assert isinstance(mutation(bytes(range(seed)), Random(seed)), bytes)  # type: ignore[operator]
