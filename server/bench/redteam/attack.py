"""What an attack is, and what came of it."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rudder.server.bench.redteam.target import Refused, Target

# What an attacker has: prompts; and sampling parameters; and programs on rows that are not locked; and raw vectors.
Grade = Literal["L0", "L1", "L2", "L3"]
Attempt = Callable[[Target, bool], Awaitable[float]]


@dataclass(frozen=True)
class Attack:
    """An attack.

    `attempt(target, guarded)` carries it out and returns `figure`, a number that is larger the more the attacker has
    won; it raises Refused where the server refused. Without `guarded`, the guard named by `control` is away, and the
    figure must reach `wins`: else the attack shows nothing. With it, the server must refuse for the reason `refused`,
    or the figure may be `holds` at most; with neither, the figure is reported and has no bound. `long`: takes more than
    some seconds.
    """

    id: str
    title: str
    grade: Grade
    attempt: Attempt
    figure: str
    control: str
    wins: float
    refused: str = ""
    holds: float | None = None
    long: bool = False

    @property
    def expected(self) -> str:
        """The outcome that the attack must have."""
        if self.refused:
            return f"refused:{self.refused}"
        return "reported" if self.holds is None else f"holds:{self.figure} <= {self.holds:g}"

    @property
    def key(self) -> str:
        """Name of the attack in tables and tests."""
        return f"{self.id} {self.title}"


@dataclass(frozen=True)
class Result:
    """What came of an attack.

    `outcome`: `holds`, `broken`, `reported`, or `refused:` with the reason. `value`: its figure, None if refused.
    `control`: the figure without the guard; `control_outcome`: `succeeds`, `fails`, or `refused:`.
    """

    attack: Attack
    outcome: str
    value: float | None
    control_outcome: str
    control: float | None

    @property
    def passed(self) -> bool:
        """Whether the server held, and the control shows that it had something to hold against."""
        expected = "holds" if self.attack.holds is not None else self.attack.expected
        return self.outcome == expected and self.control_outcome == "succeeds"

    def document(self) -> dict[str, Any]:
        """Return the result in the form of the JSON report."""
        values = asdict(self)
        described = {name: values["attack"][name] for name in ("id", "title", "grade", "figure", "wins")}
        removed = {"guard": self.attack.control, "outcome": self.control_outcome, "value": self.control}
        return described | {
            "expected": self.attack.expected,
            "outcome": self.outcome,
            "value": self.value,
            "control": removed,
            "passed": self.passed,
        }


async def carry_out(attack: Attack, target: Target) -> Result:
    """Carry out an attack, and its control."""
    outcome, value = await attempted(attack, target, guarded=True)
    if value is not None:
        outcome = judged(attack, value)
    control_outcome, control = await attempted(attack, target, guarded=False)
    if control is not None:
        control_outcome = "succeeds" if control >= attack.wins else "fails"
    return Result(attack, outcome, value, control_outcome, control)


def judged(attack: Attack, value: float) -> str:
    """Return the outcome of an attempt that was not refused."""
    if attack.holds is None:
        return "broken" if attack.refused else "reported"
    return "holds" if value <= attack.holds else "broken"


async def attempted(attack: Attack, target: Target, *, guarded: bool) -> tuple[str, float | None]:
    """Return the figure of an attempt, or how the server refused it."""
    try:
        return "", float(await attack.attempt(target, guarded))
    except Refused as refused:
        return f"refused:{refused.reason}", None
