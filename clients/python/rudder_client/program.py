"""Programs written down in Python: which rows of the residual stream to edit, how, where and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rudder.v1 import program_pb2

Unit = Literal["absolute", "max_activation", "residual"]
Phase = Literal["both", "prompt", "generated"]
UNITS = {
    "absolute": program_pb2.UNIT_ABSOLUTE,
    "max_activation": program_pb2.UNIT_MAX_ACTIVATION,
    "residual": program_pb2.UNIT_RESIDUAL_NORM,
}
PHASES = {"both": program_pb2.PHASE_BOTH, "prompt": program_pb2.PHASE_PROMPT, "generated": program_pb2.PHASE_GENERATED}


@dataclass(frozen=True)
class Feature:
    """A latent of a served SAE; `bundle` may be left out where the site has one."""

    index: int
    bundle: str = ""


@dataclass(frozen=True)
class Vector:
    """A control vector of the model's width."""

    values: Sequence[float]
    name: str = ""


@dataclass(frozen=True)
class Probe:
    """A linear probe: its activation is x . weights + bias."""

    weights: Sequence[float]
    bias: float = 0.0
    name: str = ""


Row = int | Feature | Vector | Probe


def row_message(row: Row) -> program_pb2.Row:
    """The contract's form of a row; a bare number is a latent's."""
    match row:
        case Vector():
            return program_pb2.Row(vector=program_pb2.Vector(name=row.name, values=row.values))
        case Probe():
            return program_pb2.Row(probe=program_pb2.Probe(name=row.name, weights=row.weights, bias=row.bias))
        case Feature():
            return program_pb2.Row(feature=program_pb2.Feature(bundle=row.bundle, index=row.index))
    return program_pb2.Row(feature=program_pb2.Feature(index=row))


class Program:
    """Edits per site, and a gate that opens them. Each method returns a new, longer program; `at` says where.

    Values are in `unit`: the SAE's own activations, multiples of the latent's largest activation, or of ||x||.
    """

    def __init__(self, name: str = "", description: str = "") -> None:
        self.message = program_pb2.Program(name=name, description=description)
        self.site = ""

    def at(self, site: str, *, restore_norm: bool = False, max_displacement: float | None = None) -> "Program":
        """Edits from here on are at `site`; `max_displacement`: of x there, as a share of ||x||."""
        program = self._copy()
        program.site = site
        if restore_norm or max_displacement is not None:
            edits = program._here()
            edits.restore_norm = restore_norm
            if max_displacement is not None:
                edits.max_displacement = max_displacement
        return program

    def add(
        self, feature: int | Feature | None = None, value: float = 1.0, *, unit: Unit = "absolute",
        vector: Vector | Sequence[float] | None = None, when_above: float | None = None, phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Add to a feature's activation, or add a multiple of a vector."""
        edit = program_pb2.Edit(row=row_message(either(feature, vector)), add=value)
        return self._with(edit, unit, when_above, phase)

    def set(
        self, feature: int | Feature | None = None, to: float = 0.0, *, vector: Vector | Sequence[float] | None = None,
        unit: Unit = "absolute", when_above: float | None = None, phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Give a feature this activation."""
        edit = program_pb2.Edit(row=row_message(either(feature, vector)), set=to)
        return self._with(edit, unit, when_above, phase)

    def ablate(self, feature: int | Feature, *, when_above: float | None = None, phase: Phase = "both") -> "Program":
        """Take a feature's activation away."""
        return self._with(program_pb2.Edit(row=row_message(feature), ablate=True), "absolute", when_above, phase)

    def scale(
        self, feature: int | Feature, by: float, *, when_above: float | None = None, phase: Phase = "both"
    ) -> "Program":
        """Multiply a feature's activation."""
        return self._with(program_pb2.Edit(row=row_message(feature), scale=by), "absolute", when_above, phase)

    def cap(
        self, feature: int | Feature, at: float, *, unit: Unit = "absolute", when_above: float | None = None,
        phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Let a feature's activation be at most this."""
        return self._with(program_pb2.Edit(row=row_message(feature), cap=at), unit, when_above, phase)

    def floor(
        self, feature: int | Feature, at: float, *, unit: Unit = "absolute", when_above: float | None = None,
        phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Let a feature's activation be at least this."""
        return self._with(program_pb2.Edit(row=row_message(feature), floor=at), unit, when_above, phase)

    def clamp(
        self, feature: int | Feature, to: float, *, unit: Unit = "absolute", when_above: float | None = None,
        phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Where a feature is active, give it this activation: below 0, it is unlearned."""
        return self._with(program_pb2.Edit(row=row_message(feature), clamp=to), unit, when_above, phase)

    def blend(
        self, weight: float, *, vector: Vector | Sequence[float] | None = None, bundle: str = "", phase: Phase = "both"
    ) -> "Program":
        """Move x by this share of the way to the mean of a bundle's corpus, or to a vector."""
        program = self._copy()
        blend = program._here().blend
        blend.weight, blend.phase = weight, PHASES[phase]
        if vector is not None:
            blend.vector.CopyFrom(row_message(as_vector(vector)).vector)
        elif bundle:
            blend.bundle = bundle
        return program

    def gate(self, row: Row, above: float = 0.0) -> "Program":
        """Edit only at tokens where this row is above a threshold here; of several, any."""
        program = self._copy()
        gate = program._gate()
        gate.any_of.add(row=row_message(row), above=above)
        return program

    def gate_sequence(
        self, row: Row, level: float, *, share_above: float | None = None, moving_average: float | None = None,
        window: int | None = None, cusum_drift: float | None = None, latch: bool = False, min_tokens: int = 0,
    ) -> "Program":  # fmt: skip
        """Edit only while a statistic of this row over the tokens so far is above `level`.

        One of: the share of tokens where it is above a value, its moving average with this decay, its mean over a
        window of tokens, its cumulative sum less this drift a token. `latch`: once open, open for good.
        """
        program = self._copy()
        sequence = program_pb2.SequenceCondition(
            score=row_message(row), level=level, latch=latch, min_tokens=min_tokens
        )
        if share_above is not None:
            sequence.share.above = share_above
        if moving_average is not None:
            sequence.moving_average.decay = moving_average
        if window is not None:
            sequence.window.tokens = window
        if cusum_drift is not None:
            sequence.cusum.drift = cusum_drift
        program._gate().sequence.CopyFrom(sequence)
        return program

    def _copy(self) -> "Program":
        program = Program()
        program.message.CopyFrom(self.message)
        program.site = self.site
        return program

    def _here(self) -> program_pb2.SiteEdits:
        if not self.site:
            raise ValueError("say where first: Program().at(site)")
        found = [edits for edits in self.message.sites if edits.site == self.site]
        return found[0] if found else self.message.sites.add(site=self.site)

    def _gate(self) -> program_pb2.Gate:
        if self.message.gate.site not in ("", self.site) or not self.site:
            raise ValueError(
                f"a program has one gate, read at one site: {self.message.gate.site or 'say which with at()'}"
            )
        self.message.gate.site = self.site
        return self.message.gate

    def _with(self, edit: program_pb2.Edit, unit: Unit, when_above: float | None, phase: Phase) -> "Program":
        program = self._copy()
        edit.unit, edit.phase = UNITS[unit], PHASES[phase]
        if when_above is not None:
            edit.when_above = when_above
        program._here().edits.append(edit)
        return program


def either(feature: int | Feature | None, vector: Vector | Sequence[float] | None) -> Row:
    """The one of the two that is given."""
    if (feature is None) == (vector is None):
        raise ValueError("give a feature or a vector")
    return feature if feature is not None else as_vector(vector or ())


def as_vector(vector: Vector | Sequence[float]) -> Vector:
    """Plain numbers as a vector without a name."""
    return vector if isinstance(vector, Vector) else Vector(vector)
