"""Messages drawn from their descriptors: for each field a valid value, one at a bound, or an absurd one."""

from collections.abc import Callable, Mapping, Sequence
from math import inf, nan
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

# Draws that go deeper than this leave submessages empty; requests have no deeper valid ones.
MAX_DEPTH = 7
SIGNED = [0, 1, -1, 2, 7, 100, 2**31 - 1, -(2**31)]
UNSIGNED = [0, 1, 2, 3, 5, 16, 63, 64, 127, 128, 255, 1000, 4096, 2**31, 2**32 - 1]
REALS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-7, 2.0, 1e30, -1e30, 3.4e38, inf, -inf, nan]
TEXTS = [
    "",
    "a",
    "The cells of the body",
    "x" * 300,
    "\x00",
    "\u202e\u0301",
    "<|im_start|>",
    "é" * 40,
    '{"a": 1}',
    "(a+)+$",
]
COUNTS = [0, 1, 1, 1, 2, 2, 3, 8, 40]
BYTES = [b"", b"\x00", b"\xff" * 16, b"a" * 64]

NUMBERS: dict[int, Sequence[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: REALS,
    FieldDescriptor.TYPE_FLOAT: REALS,
    FieldDescriptor.TYPE_INT32: SIGNED,
    FieldDescriptor.TYPE_SINT32: SIGNED,
    FieldDescriptor.TYPE_INT64: [*SIGNED, 2**63 - 1, -(2**63)],
    FieldDescriptor.TYPE_UINT32: UNSIGNED,
    FieldDescriptor.TYPE_UINT64: [*UNSIGNED, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_BOOL: [False, True],
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: BYTES,
}


class Messages:
    """Draws messages. `known`: by name of a field, values with which a request gets further than its first check."""

    def __init__(self, random: Random, known: Mapping[str, Sequence[Any]]) -> None:
        self.random, self.known = random, known

    def draw(self, kind: type[Message]) -> Message:
        """Return a message of a kind. Half of them are sparse: what is deep inside is reached with the rest valid."""
        message = kind()
        self.fill(message, 0, self.random.choice((0.15, 0.5)))
        return message

    def fill(self, message: Any, depth: int, share: float) -> None:
        """Set this share of a message's fields, of a oneof at most one."""
        descriptor: Descriptor = message.DESCRIPTOR
        alternatives = [self.random.choice(oneof.fields) for oneof in descriptor.oneofs if len(oneof.fields) > 1]
        within = {field.name for oneof in descriptor.oneofs if len(oneof.fields) > 1 for field in oneof.fields}
        for field in descriptor.fields:
            wanted = field in alternatives if field.name in within else self.wanted(field, share)
            if wanted and not (field.message_type and depth >= MAX_DEPTH):
                self.set(message, field, depth, share)

    def wanted(self, field: FieldDescriptor, share: float) -> bool:
        """Return whether to set a field. Most requests have a prompt, without which the rest is not looked at."""
        return self.random.random() < (0.9 if field.name in ("prompt", "row", "sites", "edits") else share)

    def set(self, message: Any, field: FieldDescriptor, depth: int, share: float) -> None:
        """Set one field."""
        value = getattr(message, field.name)
        if is_map(field):
            self.fill_map(value, field)
        elif field.is_repeated:
            for _ in range(self.random.choice(COUNTS)):
                if field.message_type:
                    self.fill(value.add(), depth + 1, share)
                else:
                    value.append(self.scalar(field))
        elif field.message_type:
            value.SetInParent()
            self.fill(value, depth + 1, share)
        else:
            setattr(message, field.name, self.scalar(field))

    def fill_map(self, value: Any, field: FieldDescriptor) -> None:
        """Set some entries of a map of scalars."""
        key, item = (entry_of(field).fields_by_name[name] for name in ("key", "value"))
        if item.message_type is None:
            for _ in range(self.random.choice(COUNTS)):
                value[self.scalar(key)] = self.scalar(item)

    def scalar(self, field: FieldDescriptor) -> Any:
        """Return a value of a field: mostly a known one, if there are some."""
        known = self.known.get(field.name)
        if known and self.random.random() < 0.8:
            return self.random.choice(known)
        if field.enum_type:
            return self.random.choice([*(value.number for value in field.enum_type.values), 99])
        value = self.random.choice(NUMBERS[field.type])
        return min(max(value, -3.4e38), 3.4e38) if is_finite_float(field, value) else value


def entry_of(field: FieldDescriptor) -> Descriptor:
    """Return the message of an entry of a map."""
    assert field.message_type
    return field.message_type


def is_map(field: FieldDescriptor) -> bool:
    """Return whether a field is a map."""
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def is_finite_float(field: FieldDescriptor, value: Any) -> bool:
    """Return whether a value of a field must fit single precision."""
    return field.type == FieldDescriptor.TYPE_FLOAT and value == value and abs(value) != inf


# --- bytes ---


def truncated(data: bytes, random: Random) -> bytes:
    """Leave out the end."""
    return data[: random.randrange(len(data) + 1)]


def flipped(data: bytes, random: Random) -> bytes:
    """Change some bits."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 8) if changed else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def repeated(data: bytes, random: Random) -> bytes:
    """Repeat a part, so that fields are there twice."""
    begin, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[begin:end] * random.randint(1, 20) + data[end:]


def inserted(data: bytes, random: Random) -> bytes:
    """Insert what parsers stumble over: overlong varints, groups, tags of other wire types, bytes that are no UTF-8."""
    part = random.choice(
        [b"\xff" * 10 + b"\x01", b"\x80" * 9 + b"\x01", b"\x0b", b"\x0c", b"\x07", b"\x0a\xff\xff\xff\xff\x0f",
         b"\x0a\x04\xf0\x28\x8c\x28", b"\x00", bytes([random.randrange(256)]) * random.randint(1, 40)]
    )  # fmt: skip
    at = random.randrange(len(data) + 1)
    return data[:at] + part + data[at:]


def nested(data: bytes, random: Random) -> bytes:
    """Put the bytes into themselves, as field 1, some times."""
    for _ in range(random.choice((1, 5, 60, 150))):
        if len(data) > 60_000:
            break
        size, prefix = len(data), b"\x0a"
        while size > 127:
            prefix, size = prefix + bytes([size & 127 | 128]), size >> 7
        data = prefix + bytes([size]) + data
    return data


MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (truncated, flipped, repeated, inserted, nested)


def mutated(data: bytes, random: Random) -> bytes:
    """Return bytes with one to three mutations."""
    for _ in range(random.randint(1, 3)):
        data = random.choice(MUTATIONS)(data, random)
    return data
