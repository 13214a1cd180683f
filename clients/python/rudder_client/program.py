"""Programs: edits of SAE latents, control vectors and probes in the residual stream, by site, phase and gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rudder.v1 import program_pb2

Unit = Literal["absolute", "max_activation", "residual"]
Phase = Literal["both", "prompt", "generated"]
UNITS = {
    "absolute": program_pb2.UNIT_ABSOLUTE,
    "max_activation": program_pb2.UNIT_MAX_ACTIVATION,
    "residual": program_pb2.UNIT_RESIDUAL_NORM,
}
PHASES = {"both": program_pb2.PHASE_BOTH, "prompt": program_pb2.PHASE_PROMPT, "generated": program_pb2.PHASE_GENERATED}


def named(values: Mapping[str, Any], name: str, field: str) -> Any:
    """Return the value of a name. ValueError: there is no such name."""
    if name not in values:
        raise ValueError(f"{field}: {name!r} is none of {', '.join(values)}")
    return values[name]


class Array(Protocol):
    """An array of NumPy or a tensor of PyTorch, of one dimension."""

    def tolist(self) -> Any:
        """Return plain numbers."""


Numbers = Sequence[float] | Array


@dataclass(frozen=True)
class Feature:
    """A latent of a served SAE; without `bundle` of the first one served at the site."""

    index: int
    bundle: str = ""


@dataclass(frozen=True)
class Vector:
    """A control vector; `values` has the hidden size of the model."""

    values: Numbers
    name: str = ""


@dataclass(frozen=True)
class Probe:
    """A linear probe: its activation is x . weights + bias; `weights` has the hidden size of the model."""

    weights: Numbers
    bias: float = 0.0
    name: str = ""


Row = int | Feature | Vector | Probe


def row_message(row: Row) -> program_pb2.Row:
    """Convert a row to its message; a number is the index of a latent."""
    match row:
        case Vector():
            return program_pb2.Row(vector=program_pb2.Vector(name=row.name, values=numbers(row.values)))
        case Probe():
            probe = program_pb2.Probe(name=row.name, weights=numbers(row.weights), bias=row.bias)
            return program_pb2.Row(probe=probe)
        case Feature():
            return program_pb2.Row(feature=program_pb2.Feature(bundle=row.bundle, index=row.index))
    return program_pb2.Row(feature=program_pb2.Feature(index=row))


class Program:
    """Edits per site, and an optional gate. Each method returns a new program; `at` selects the site of the next edits.

    Values are in `unit`: `absolute` (activations of the SAE; multiples of a vector), `max_activation` (multiples of the
    latent's maximum activation) or `residual` (x moves by this multiple of ||x||). `phase` selects prompt tokens,
    generated tokens or both. An edit with `when_above` applies only at tokens where its row is above that activation.
    """

    def __init__(self, name: str = "", description: str = "") -> None:
        self.message = program_pb2.Program(name=name, description=description)
        self.site = ""

    def at(self, site: str, *, restore_norm: bool | None = None, max_displacement: float | None = None) -> "Program":
        """Select the site of the next edits.

        `restore_norm`: rescale the edited x to its norm before the edits. `max_displacement`: cap on ||x' - x||, as a
        share of ||x||. None leaves what an earlier call set for the site; at first neither applies.
        """
        program = self._copy()
        program.site = site
        if restore_norm is not None:
            program._here().restore_norm = restore_norm
        if max_displacement is not None:
            program._here().max_displacement = max_displacement
        return program

    def add(
        self, feature: int | Feature | None = None, by: float = 1.0, *, unit: Unit = "absolute",
        vector: Vector | Numbers | None = None, when_above: float | None = None, phase: Phase = "both",
        value: float | None = None,
    ) -> "Program":  # fmt: skip
        """Add `by` to a feature's activation, or `by` times a vector to x. `value` is the former name of `by`."""
        if value is not None and by != 1.0:
            raise ValueError("add: `value` is the former name of `by`: give one of them")
        edit = program_pb2.Edit(row=row_message(either(feature, vector)), add=by if value is None else value)
        return self._with(edit, unit, when_above, phase)

    def set(
        self, feature: int | Feature | None = None, to: float = 0.0, *, vector: Vector | Numbers | None = None,
        unit: Unit = "absolute", when_above: float | None = None, phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Set a feature's activation to `to`; for a vector, whose activation is 0, the same as `add`."""
        edit = program_pb2.Edit(row=row_message(either(feature, vector)), set=to)
        return self._with(edit, unit, when_above, phase)

    def ablate(self, feature: int | Feature, *, when_above: float | None = None, phase: Phase = "both") -> "Program":
        """Set a feature's activation to 0."""
        return self._with(program_pb2.Edit(row=row_message(feature), ablate=True), "absolute", when_above, phase)

    def scale(
        self, feature: int | Feature, by: float, *, when_above: float | None = None, phase: Phase = "both"
    ) -> "Program":
        """Multiply a feature's activation by `by`."""
        return self._with(program_pb2.Edit(row=row_message(feature), scale=by), "absolute", when_above, phase)

    def cap(
        self, feature: int | Feature, at: float, *, unit: Unit = "absolute", when_above: float | None = None,
        phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Limit a feature's activation to at most `at`."""
        return self._with(program_pb2.Edit(row=row_message(feature), cap=at), unit, when_above, phase)

    def floor(
        self, feature: int | Feature, at: float, *, unit: Unit = "absolute", when_above: float | None = None,
        phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Raise a feature's activation to at least `at`."""
        return self._with(program_pb2.Edit(row=row_message(feature), floor=at), unit, when_above, phase)

    def clamp(
        self, feature: int | Feature, to: float, *, unit: Unit = "absolute", when_above: float | None = None,
        phase: Phase = "both",
    ) -> "Program":  # fmt: skip
        """Set a feature's activation to `to` where it is active; a value below 0 unlearns it."""
        return self._with(program_pb2.Edit(row=row_message(feature), clamp=to), unit, when_above, phase)

    def blend(
        self, weight: float, *, vector: Vector | Numbers | None = None, bundle: str = "", phase: Phase = "both"
    ) -> "Program":
        """Interpolate x towards the mean residual of a bundle's corpus, or a vector, with this weight; once a site."""
        program = self._copy()
        if program._here().HasField("blend"):
            raise ValueError(f"blend: {self.site} has one already")
        if vector is not None and bundle:
            raise ValueError("blend: give a vector or a bundle")
        blend = program._here().blend
        blend.weight, blend.phase = weight, named(PHASES, phase, "phase")
        if vector is not None:
            blend.vector.CopyFrom(row_message(as_vector(vector)).vector)
        elif bundle:
            blend.bundle = bundle
        return program

    def gate(self, row: Row, above: float = 0.0) -> "Program":
        """Edit only at tokens where this row is above `above` at the current site; of several rows, any."""
        program = self._copy()
        gate = program._gate()
        gate.any_of.add(row=row_message(row), above=above)
        return program

    def gate_sequence(
        self, row: Row, level: float, *, share_above: float | None = None, moving_average: float | None = None,
        window: int | None = None, cusum_drift: float | None = None, latch: bool = False, min_tokens: int = 0,
    ) -> "Program":  # fmt: skip
        """Edit only while a statistic of this row over the tokens so far is above `level`.

        Give one statistic: `share_above` (share of tokens above this activation), `moving_average` (with this decay),
        `window` (mean over this number of tokens) or `cusum_drift` (cumulative sum, less this drift per token).
        `latch`: once open, the gate stays open. `min_tokens`: the gate stays closed before this number of tokens.
        """
        given = [value for value in (share_above, moving_average, window, cusum_drift) if value is not None]
        if len(given) != 1:
            names = "share_above, moving_average, window and cusum_drift"
            raise ValueError(f"gate_sequence: give one of {names}, not {len(given)}")
        if self.message.gate.HasField("sequence"):
            raise ValueError("gate_sequence: a program has one condition on the sequence")
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
            raise ValueError("no site: call at(site) first")
        matches = [edits for edits in self.message.sites if edits.site == self.site]
        return matches[0] if matches else self.message.sites.add(site=self.site)

    def _gate(self) -> program_pb2.Gate:
        if self.message.gate.site not in ("", self.site) or not self.site:
            raise ValueError(f"a program has one gate, at one site: {self.message.gate.site or 'call at(site) first'}")
        self.message.gate.site = self.site
        return self.message.gate

    def _with(self, edit: program_pb2.Edit, unit: Unit, when_above: float | None, phase: Phase) -> "Program":
        program = self._copy()
        edit.unit, edit.phase = named(UNITS, unit, "unit"), named(PHASES, phase, "phase")
        if when_above is not None:
            edit.when_above = when_above
        program._here().edits.append(edit)
        return program


def either(feature: int | Feature | None, vector: Vector | Numbers | None) -> Row:
    """Return the feature or the vector. ValueError: neither or both."""
    if (feature is None) == (vector is None):
        raise ValueError("give a feature or a vector")
    return feature if feature is not None else as_vector(() if vector is None else vector)


def as_vector(vector: Vector | Numbers) -> Vector:
    """Convert plain numbers to a vector without a name."""
    return vector if isinstance(vector, Vector) else Vector(vector)


def numbers(values: Numbers) -> Sequence[float]:
    """Return plain numbers."""
    plain: Sequence[float] = values if isinstance(values, Sequence) else values.tolist()
    return plain
