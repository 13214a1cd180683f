"""The cases of a fuzz run: the method and the bytes of each, by its number and the seed. And the corpus."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from rudder.server.grpc.server import SERVICES
from rudder.v1 import catalogue_pb2, debug_pb2, inference_pb2, policy_pb2
from tests.fuzz.messages import Messages, mutated

FILES = (inference_pb2.DESCRIPTOR, catalogue_pb2.DESCRIPTOR, policy_pb2.DESCRIPTOR, debug_pb2.DESCRIPTOR)
CORPUS = Path(__file__).parent / "corpus.txt"
# Of the cases, those whose bytes are changed; the others are messages as a client's library writes them.
MUTATED = 0.3
# Methods that are drawn more often than others, and those that would change the server for the cases that follow.
WEIGHTS = {"Generate": 6, "Complete": 4, "Inspect": 4, "Validate": 3, "Apply": 0}


class Method(NamedTuple):
    """A method of the contract. `path`: of gRPC; `name`: `Service.Method`."""

    path: str
    name: str
    request: type[Message]
    streams: bool


class Case(NamedTuple):
    """What is sent."""

    method: Method
    data: bytes


def methods() -> list[Method]:
    """Return every method of the contract."""
    return [
        Method(
            f"/{service.full_name}/{m.name}",
            f"{service.name}.{m.name}",
            GetMessageClass(m.input_type),
            m.server_streaming,
        )
        for file in FILES
        for service in file.services_by_name.values()
        if service.full_name in SERVICES
        for m in service.methods
    ]


def drawn(seed: int, number: int, known: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    """Yield the corpus, and then `number` drawn cases."""
    yield from corpus()
    random, all_methods = Random(seed), methods()
    messages = Messages(random, known)
    weights = [WEIGHTS.get(method.name.split(".")[1], 1) for method in all_methods]
    for method in random.choices(all_methods, weights, k=number):
        data = messages.draw(method.request).SerializeToString()
        yield Case(method, mutated(data, random) if random.random() < MUTATED else data)


def corpus() -> list[Case]:
    """Return the committed cases: one in each line, the method and the bytes in hexadecimal digits; `#` says why."""
    by_name = {method.name: method for method in methods()}
    lines = [line.partition("#")[0].split() for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    return [Case(by_name[words[0]], bytes.fromhex("".join(words[1:]))) for words in lines if words]


def line_of(case: Case) -> str:
    """Return the line of the corpus that holds a case."""
    return f"{case.method.name} {case.data.hex()}"
