"""The JSON schema of a message's JSON form, as the YAML files of programs and policies are written."""

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

DRAFT = "https://json-schema.org/draft/2020-12/schema"
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
NUMBERS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)


def schema_of(message: Any) -> dict[str, Any]:
    """Return the JSON schema of the descriptor `message`: its fields by the names of the contract."""
    definitions: dict[str, Any] = {}
    define(message, definitions)
    return {"$schema": DRAFT, "$ref": reference(message), "$defs": dict(sorted(definitions.items()))}


def reference(message: Any) -> str:
    """Return the reference to the definition of a message."""
    return f"#/$defs/{message.name}"


def define(message: Any, definitions: dict[str, Any]) -> None:
    """Add the definitions of a message and of all messages in its fields."""
    if message.name in definitions:
        return
    definitions[message.name] = None
    properties = {field.name: value_schema(field, definitions) for field in message.fields}
    definition: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    # Of the members of a oneof at most one is there.
    groups = [oneof for oneof in message.oneofs if not oneof.name.startswith("_")]
    exclusive = [
        {"not": {"required": [first.name, second.name]}}
        for oneof in groups
        for i, first in enumerate(oneof.fields)
        for second in oneof.fields[i + 1 :]
    ]
    definitions[message.name] = definition | ({"allOf": exclusive} if exclusive else {})


def value_schema(field: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field's value."""
    entry = field.message_type if field.message_type is not None else None
    if entry is not None and entry.GetOptions().map_entry:
        value = single_schema(entry.fields_by_name["value"], definitions)
        return {"type": "object", "additionalProperties": value}
    single = single_schema(field, definitions)
    return {"type": "array", "items": single} if field.is_repeated else single


def single_schema(field: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one value of a field."""
    kind = field.cpp_type
    if field.message_type is not None:
        define(field.message_type, definitions)
        return {"$ref": reference(field.message_type)}
    if field.enum_type is not None:
        return {"enum": [value.name for value in field.enum_type.values]}
    if kind in INTEGERS:
        minimum, maximum = INTEGERS[kind]
        return {"type": "integer", "minimum": minimum, "maximum": maximum}
    if kind in NUMBERS:
        return {"type": "number"}
    return {"type": "boolean" if kind == FieldDescriptor.CPPTYPE_BOOL else "string"}
