"""Named programs and policies: a folder of YAML files, each the JSON form of message Program."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from google.protobuf import json_format

from rudder.sae_models.errors import UserError
from rudder.server.program.compile import Compiled
from rudder.v1 import program_pb2


@dataclass(frozen=True)
class NamedProgram:
    """A named program or policy: its message, as written, and its compiled form."""

    message: program_pb2.Program
    compiled: Compiled


class ProgramFileError(UserError):
    """A file is not a valid program; the message begins with its path."""


def load_programs(folder: Path) -> dict[str, program_pb2.Program]:
    """Read the programs of all `*.yaml` files in `folder`, by name. Raises ProgramFileError."""
    programs: dict[str, program_pb2.Program] = {}
    for path in sorted(folder.glob("*.yaml")):
        program = read_program(path)
        if program.name in programs:
            raise ProgramFileError(f"{path}: name: {program.name!r} is defined twice")
        programs[program.name] = program
    return programs


def read_program(path: Path) -> program_pb2.Program:
    """Read a program file. Raises ProgramFileError."""
    program = program_pb2.Program()
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ProgramFileError(f"{path}: is not a mapping of a program's fields")
        json_format.ParseDict(document, program)
    except (yaml.YAMLError, UnicodeDecodeError, json_format.ParseError) as error:
        raise ProgramFileError(f"{path}: {error}") from error
    if not program.name:
        raise ProgramFileError(f"{path}: name: is empty")
    return program
