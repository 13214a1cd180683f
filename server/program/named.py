"""Named programs and policies: folders of YAML files, each the JSON form of message Program or Policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from google.protobuf import json_format
from google.protobuf.message import Message

from rudder.sae_models.errors import UserError
from rudder.server.program.compile import Compiled
from rudder.v1 import policy_pb2, program_pb2

M = TypeVar("M", bound=Message)
# What a file of a program has and one of a policy does not.
PROGRAM_FIELDS = frozenset({"sites", "gate"})


@dataclass(frozen=True)
class NamedProgram:
    """A named program: its message, as written, and its compiled form."""

    message: program_pb2.Program
    compiled: Compiled


class ProgramFileError(UserError):
    """A file is not a valid program or policy; the message begins with its path."""


def load_programs(folder: Path) -> dict[str, program_pb2.Program]:
    """Read the programs of all `*.yaml` files in `folder`, by name. Raises ProgramFileError."""
    programs: dict[str, program_pb2.Program] = {}
    for path in program_files(folder):
        program = read_program(path)
        if program.name in programs:
            raise ProgramFileError(f"{path}: name: {program.name!r} is defined twice")
        programs[program.name] = program
    return programs


def load_policies(folder: Path) -> dict[Path, policy_pb2.Policy]:
    """Read the policies of all `*.yaml` files in `folder`, by path. Raises ProgramFileError."""
    policies = {path: read_policy(path) for path in program_files(folder)}
    paths: dict[str, Path] = {}
    for path, policy in policies.items():
        first = paths.setdefault(policy.name, path)
        if first != path:
            raise ProgramFileError(f"{path}: name: {policy.name!r} is the policy of {first.name}, too")
    return policies


def program_files(folder: Path) -> list[Path]:
    """Return the files of a folder, in the order of their names."""
    return sorted(folder.glob("*.yaml"))


def read_program(path: Path) -> program_pb2.Program:
    """Read a program file. Raises ProgramFileError."""
    program = parsed(path, read_mapping(path, "a program's"), program_pb2.Program())
    if not program.name:
        raise ProgramFileError(f"{path}: name: is empty")
    return program


def read_policy(path: Path) -> policy_pb2.Policy:
    """Read a policy file. Raises ProgramFileError, which says what to write where the file is a program."""
    document = read_mapping(path, "a policy's")
    if PROGRAM_FIELDS & document.keys() and "program" not in document:
        problem = "is a program, not a policy: write it below `program:`, and beside that `name`, `version`"
        raise ProgramFileError(f"{path}: {problem}, `bundles` and whom it `binds` (docs/policies.md)")
    policy = parsed(path, document, policy_pb2.Policy())
    if not policy.name:
        raise ProgramFileError(f"{path}: name: is empty")
    return policy


def read_mapping(path: Path, whose: str) -> dict[str, Any]:
    """Read a YAML file that is a mapping of fields. Raises ProgramFileError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProgramFileError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise ProgramFileError(f"{path}: is not a mapping of {whose} fields")
    return document


def parsed(path: Path, document: Mapping[str, Any], message: M) -> M:
    """Parse each field of a document into a message. Raises ProgramFileError, which names all fields at fault."""
    problems = [problem for field in document.items() if (problem := parse_field(field, message))]
    if problems:
        raise ProgramFileError(f"{path}: {'; '.join(problems)}")
    return message


def parse_field(field: tuple[str, Any], message: Message) -> str:
    """Parse one field into a message; return what is wrong with it, or nothing."""
    try:
        json_format.ParseDict(dict([field]), message)
    except json_format.ParseError as error:
        return str(error)
    return ""
