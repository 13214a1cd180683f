"""The field `rudder` of requests and answers: what is steered and reported, and what ran."""

import re
from typing import Any, Protocol, TypeVar

import msgspec
from google.protobuf import json_format
from google.protobuf.message import Message

from rudder.server.http.fields import UInt32
from rudder.server.service.errors import Refusal, invalid
from rudder.v1 import inference_pb2, program_pb2

M = TypeVar("M", bound=Message)
# Where protobuf's messages say what is wrong: "... at "Program.sites[0].edits[0]"."
PLACE = re.compile(r' at "\w+\.(?P<path>[^"]+)"')


class Topic(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A topic to steer by, as TopicSteering of the contract."""

    topic: str
    strength: float | None = None
    kl: float | None = None


class Rudder(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The extension of a request.

    `program`: the name of one of the operator's, or Program in its JSON form. `report`: Report in its JSON form.
    `stream_interval`: tokens per event, at least.
    """

    program: str | dict[str, Any] | None = None
    topic: str | Topic | None = None
    report: dict[str, Any] | None = None
    stream_interval: UInt32 = 0


class Steered(Protocol):
    """A request of the contract, for what the extension sets."""

    steering: inference_pb2.Steering
    report: inference_pb2.Report


# The contract's fields that the extension sets, by their names in it.
NAMES = {
    "steering.name": "rudder.program",
    "steering.program": "rudder.program",
    "steering.topic": "rudder.topic",
    "steering": "rudder",
    "report": "rudder.report",
    "stream_interval": "rudder.stream_interval",
}


def extend(request: Any, extension: Rudder) -> None:
    """Set what the extension asks for in a request of the contract. Raises Refusal, which names the field."""
    if extension.program is not None and extension.topic is not None:
        raise invalid("rudder.topic", "may not be beside rudder.program")
    match extension.program:
        case str() as name:
            request.steering.name = name
        case dict() as document:
            request.steering.program.CopyFrom(parsed(document, program_pb2.Program(), "rudder.program"))
    match extension.topic:
        case str() as topic:
            request.steering.topic.topic = topic
        case Topic():
            set_topic(request.steering.topic, extension.topic)
    if extension.report is not None:
        request.report.CopyFrom(parsed(extension.report, inference_pb2.Report(), "rudder.report"))
    if extension.stream_interval and isinstance(request, inference_pb2.GenerateRequest):
        request.stream_interval = extension.stream_interval


def set_topic(message: inference_pb2.TopicSteering, topic: Topic) -> None:
    """Set a topic and its amount."""
    if topic.strength is not None and topic.kl is not None:
        raise invalid("rudder.topic.kl", "may not be beside rudder.topic.strength")
    message.topic = topic.topic
    if topic.strength is not None:
        message.strength = topic.strength
    if topic.kl is not None:
        message.kl = topic.kl


def parsed(document: dict[str, Any], message: M, field: str) -> M:
    """Parse the JSON form of a message. Raises Refusal, which names the field as far as protobuf does."""
    try:
        return json_format.ParseDict(document, message, max_recursion_depth=20)
    except (json_format.ParseError, RecursionError, ValueError) as error:
        place = PLACE.search(str(error))
        raise refused(f"{field}.{place['path']}" if place else field, str(error)) from error


def refused(field: str, problem: str) -> Refusal:
    """Return the refusal of a field of the extension."""
    return invalid(field, problem or "is not in the form of the contract")


def choice_extension(choice: inference_pb2.ChoiceDelta | inference_pb2.Choice) -> dict[str, Any]:
    """Return what a choice, or a delta of one, has beyond the OpenAI API; empty if nothing."""
    result: dict[str, Any] = {}
    for name in ("activations", "attestation", "refusal"):
        if choice.HasField(name):
            result[name] = as_document(getattr(choice, name))
    if choice.pooled:
        result["pooled"] = [as_document(feature) for feature in choice.pooled]
    if choice.finish_reason:
        result["finish_reason"] = inference_pb2.FinishReason.Name(choice.finish_reason)
    return result


def answer_extension(answer: inference_pb2.GenerateResponse | inference_pb2.CompleteResponse) -> dict[str, Any]:
    """Return what an answer, or a message of a stream, has beyond the OpenAI API; empty if nothing."""
    result: dict[str, Any] = {"request_id": answer.request_id} if answer.request_id else {}
    if answer.features:
        result["features"] = [as_document(feature) for feature in answer.features]
    return result


def as_document(message: Message) -> dict[str, Any]:
    """Return a message in its JSON form, by the names of the contract; zeros that say something are there."""
    document: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document
