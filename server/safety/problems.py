"""What is wrong with a policy: every problem, by the field at fault."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from rudder.sae_models.errors import UserError
from rudder.server.program.errors import ProgramError

MAX_LISTED = 20


class Problem(NamedTuple):
    """What is wrong with one field, by its path in message Policy."""

    field: str
    text: str


class PolicyInvalid(UserError):
    """A policy cannot be put in force. `source`: its file or its name; `problems`: all that is wrong with it."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        listed = "; ".join(f"{field}: {text}" for field, text in problems[:MAX_LISTED])
        more = f"; and {len(problems) - MAX_LISTED} more problems" if len(problems) > MAX_LISTED else ""
        super().__init__(f"{source}: {listed}{more}")
        self.source, self.problems = source, list(problems)


@dataclass
class Problems:
    """Problems found so far, without repetition."""

    found: list[Problem] = field(default_factory=list)

    def add(self, field: str, text: str) -> None:
        """Note a problem."""
        problem = Problem(field, text)
        if problem not in self.found:
            self.found.append(problem)

    def require(self, condition: object, field: str, text: str) -> None:
        """Note a problem unless `condition` holds."""
        if not condition:
            self.add(field, text)

    @contextmanager
    def collected(self, written: str = "", at: str = "") -> Iterator[None]:
        """Note a ProgramError that is raised within, the path `written` at the front of its field replaced by `at`."""
        try:
            yield
        except ProgramError as error:
            self.add(at + error.field.removeprefix(written), error.message)
