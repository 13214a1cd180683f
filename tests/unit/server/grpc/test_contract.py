"""What keeps the contract fit to live with: buf's standard naming rules, and every field's number as it was."""

import re

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.message import Message

from rudder.v1 import catalogue_pb2, debug_pb2, error_pb2, inference_pb2, policy_pb2, program_pb2

FILES = tuple(
    module.DESCRIPTOR for module in (catalogue_pb2, debug_pb2, error_pb2, inference_pb2, policy_pb2, program_pb2)
)
MESSAGES = [message for file in FILES for message in file.message_types_by_name.values()]
ENUMS = [enum for file in FILES for enum in file.enum_types_by_name.values()]
SERVICES = [service for file in FILES for service in file.services_by_name.values()]
SNAKE, PASCAL = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*"), re.compile(r"([A-Z][a-z0-9]*)+")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_package_is_versioned_and_matches_its_folder(file: FileDescriptor) -> None:
    assert file.package == "rudder.v1"
    assert file.name.startswith("rudder/v1/")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_messages_and_fields(message: Descriptor) -> None:
    assert PASCAL.fullmatch(message.name)
    assert all(SNAKE.fullmatch(field.name) for field in message.fields)
    assert all(SNAKE.fullmatch(oneof.name) for oneof in message.oneofs if not oneof.name.startswith("_"))


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.name)
def test_enums_have_prefix_and_zero(enum: EnumDescriptor) -> None:
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
    assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
    assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"


def test_services_and_their_messages() -> None:
    used: list[str] = []
    for service in SERVICES:
        assert service.name.endswith("Service")
        for method in service.methods:
            for kind, suffix in ((method.input_type, "Request"), (method.output_type, "Response")):
                assert kind.name in (f"{method.name}{suffix}", f"{service.name}{method.name}{suffix}")
                used.append(kind.name)
    assert len(set(used)) == len(used) == 30


def test_a_choice_is_the_sum_of_its_deltas() -> None:
    def fields(message: type[Message]) -> list[bytes]:
        proto = descriptor_pb2.DescriptorProto()
        message.DESCRIPTOR.CopyToProto(proto)
        return [field.SerializeToString() for field in proto.field]

    assert fields(inference_pb2.Choice) == fields(inference_pb2.ChoiceDelta)
