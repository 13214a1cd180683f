"""Fields of messages by their paths, generic over the contract: what a policy forbids, and the rows that it names."""

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message

from rudder.v1 import inference_pb2

REQUESTS = (
    inference_pb2.GenerateRequest.DESCRIPTOR,
    inference_pb2.CompleteRequest.DESCRIPTOR,
    inference_pb2.InspectRequest.DESCRIPTOR,
)


# What a method does unasked, by the field with which others are asked for it.
IMPLIED = {(inference_pb2.InspectRequest, "report.prompt")}


def is_request_field(path: str) -> bool:
    """Return whether a dotted path names a field of a request, such as `sampling.logprobs`."""
    return any(has_field(request, path.split(".")) for request in REQUESTS)


def has_field(descriptor: Any, names: list[str]) -> bool:
    """Return whether a message, and the messages in its fields, have fields of these names one below the other."""
    name, *rest = names
    if descriptor is None or name not in descriptor.fields_by_name:
        return False
    field = descriptor.fields_by_name[name]
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    return not rest or has_field(None if is_map else field.message_type, rest)


def is_set(request: Message, path: str) -> bool:
    """Return whether a request sets the field at a path, or does unasked what it means.

    Of messages in a list, whether one of them sets it.
    """
    return (type(request), path) in IMPLIED or any(True for _ in values_at(request, path.split(".")))


def values_at(message: Message, names: list[str]) -> Iterator[object]:
    """Yield the values set at a path: no absent field, no empty list, no default of a field without presence."""
    name, *rest = names
    for field, value in message.ListFields():
        if field.name != name:
            continue
        if not rest:
            yield value
        elif field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from values_at(part, rest)


def submessages(message: Message, path: str = "") -> Iterator[tuple[str, Message]]:
    """Yield (path, message) of a message and of all in its fields, except entries of maps."""
    yield path, message
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        here = f"{path}.{field.name}" if path else field.name
        parts = [(f"{here}[{i}]", part) for i, part in enumerate(value)] if field.is_repeated else [(here, value)]
        for at, part in parts:
            yield from submessages(part, at)
