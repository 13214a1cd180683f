"""What the guards of a call's policies found: source of refusals, attestation, metrics, log line and audit entry."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rudder.server.engine.call import Call
from rudder.server.program.compile import Compiled


class Verdict(NamedTuple):
    """A guard that held. `action`: its name in `guards.ACTIONS`; `position`: the token at which it held; `score`: its
    statistic there. Prompt tokens count from 0, generated tokens go on from there. `shadow`: nothing came of it.
    """

    policy: str
    rule: str
    action: str
    shadow: bool
    position: int
    score: float


class Refusing(NamedTuple):
    """The verdict that ended a choice, and the operator's text for the client. Of one of the `others`: the verdict is
    about another choice of the same call.
    """

    verdict: Verdict
    text: str
    others: bool = False

    @property
    def rule(self) -> str:
        """The guard with its policy."""
        return f"{self.verdict.policy}/{self.verdict.rule}"


class Benign(NamedTuple):
    """The largest statistic of a guard that did not hold in a choice, and the level that it did not exceed."""

    policy: str
    rule: str
    maximum: float
    level: float


@dataclass
class Findings:
    """What guards found in one choice, in the order in which it was found.

    `programs`: of the policies, as they ran: a guard may open a gate from the start. None: as the call has them.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    refusing: Refusing | None = None
    benign: Sequence[Benign] = ()
    programs: tuple[Compiled, ...] | None = None

    def as_run(self, call: Call) -> Call:
        """Return a call with the programs of its policies as they ran."""
        return call if self.programs is None else replace(call, policies=self.programs)


@dataclass
class Siblings:
    """What the choices of one call share. `refusing`: ends all of them."""

    refusing: Refusing | None = None
