"""Compile a program message to the numbers of the bank's formula.

To add an edit operation, add it to `sae_models.operations.OPERATIONS`: nothing after that table knows their names.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from math import inf

import msgspec
import numpy as np

from rudder.sae_models.operations import OPERATIONS
from rudder.server.program import wire
from rudder.server.program.errors import number, require
from rudder.server.program.gates import with_gate
from rudder.server.program.rows import (
    NO_LOCKED_ROWS,
    PARALLEL,
    Floats,
    LockedRows,
    Registry,
    Resolved,
    append_row,
    blend_target,
    check_capacity,
    checked_name,
    resolve,
    row_directions,
    site_number,
)
from rudder.server.program.span import Doubles, basis, reaches, writes_of
from rudder.v1 import program_pb2

UNIT_NAMES = {
    program_pb2.UNIT_UNSPECIFIED: "",
    program_pb2.UNIT_ABSOLUTE: "",
    program_pb2.UNIT_MAX_ACTIVATION: " maximum activations",
    program_pb2.UNIT_RESIDUAL_NORM: " residual norms",
}
# (prompt tokens, generated tokens)
PHASES = {
    program_pb2.PHASE_UNSPECIFIED: (True, True),
    program_pb2.PHASE_BOTH: (True, True),
    program_pb2.PHASE_PROMPT: (True, False),
    program_pb2.PHASE_GENERATED: (False, True),
}
OPERATIONS_WITHOUT_UNIT = ("ablate", "scale")
OPERATIONS_ON_VECTORS = ("add", "set")


@dataclass(frozen=True)
class EditName:
    """Human-readable name of an edit, for attestation."""

    site: str
    row: str
    operation: str


@dataclass(frozen=True)
class Compiled:
    """A compiled program.

    `edits` has the order of the telemetry's `moved` column: for each site its edits, then its blend. `digest` (SHA-256)
    covers the numbers that run, not names, spelling or the order of sites. `in_sequence`: the edits of a token depend
    on earlier tokens. `by_phase`: they depend on where the prompt ends, and so do cached keys and values, which the
    digest alone cannot separate. `gate_site`: where the gate is read, empty without one.
    """

    sites: tuple[wire.Site, ...]
    digest: str
    edits: tuple[EditName, ...]
    in_sequence: bool
    by_phase: bool
    gate_site: str = ""

    @cached_property
    def edited_latents(self) -> LockedRows:
        """The (bundle, latent) pairs that the program edits."""
        edited = (site.rows[edit.row] for site in self.sites for edit in site.edits)
        return frozenset((row.bundle, row.latent) for row in edited if row.bundle)

    @cached_property
    def gate_latents(self) -> LockedRows:
        """The (bundle, latent) pairs that the gate reads."""
        read = (
            site.rows[row]
            for site in self.sites
            if (gate := site.gate)
            for row in (*(row for row, _ in gate.triggers), *([gate.sequence.score] if gate.sequence else []))
        )
        return frozenset((row.bundle, row.latent) for row in read if row.bundle)

    @cached_property
    def site_behind_gate(self) -> int:
        """Number of the first site whose residual the gate does not depend on; 0 without a gate."""
        return next((site.site + 1 for site in self.sites if site.gate), 0)

    @cached_property
    def first_edited_site(self) -> int | None:
        """Number of the first site, in forward order, whose residual the program changes."""
        return next((site.site for site in self.sites if site.edits or site.blend), None)


@dataclass(frozen=True, eq=False)
class EditLimits:
    """What a program may do: edits at sites number first_site to last_site (None: to the last one), of no locked row.

    `locked`: latents. `directions` [n, d], of length 1: encoders and decoders of locked rows; a row with a direction
    that is parallel to one of them counts as locked. `reads_locked`: the gate may read locked rows. `max_displacement`:
    bound of the displacement at a site as a share of ||x||.
    """

    locked: LockedRows = NO_LOCKED_ROWS
    first_site: int = 0
    last_site: int | None = None
    directions: Floats | None = None
    reads_locked: bool = False
    max_displacement: float = inf

    def check_site(self, index: int, registry: Registry, field: str) -> None:
        """Raise ProgramError POLICY_FORBIDS if site number `index` is outside the limits."""
        sites = registry.layout.sites
        if self.last_site is not None:
            behind = f"{sites[index]} comes after {sites[self.last_site]}, the first site that a policy edits"
            require(index <= self.last_site, field, behind, "POLICY_FORBIDS")
        before = f"a policy reads what is edited at {sites[index]}: its gate or its guards could be blinded there"
        require(index >= self.first_site, field, before, "POLICY_FORBIDS")

    def check_row(self, row: wire.Row, name: str, registry: Registry, field: str) -> None:
        """Raise ProgramError ROW_LOCKED if a row is locked, or parallel to one that is."""
        require((row.bundle, row.latent) not in self.locked, field, f"{name} is locked", "ROW_LOCKED")
        if self.directions is None or not len(self.directions):
            return
        cosines = np.abs(row_directions([row], registry) @ self.directions.T)
        # Not the cosine itself: step by step it would lead to the direction of a guard's probe.
        problem = f"{name} is parallel to a locked row (a cosine of less than {PARALLEL} may be)"
        require(cosines.max(initial=0) < PARALLEL, field, problem, "ROW_LOCKED")

    @cached_property
    def span(self) -> Doubles:
        """Orthonormal basis [k, d] of what the locked rows span."""
        return basis(np.zeros((0, 0)) if self.directions is None else self.directions)

    def check_writes(self, compiled: Compiled, registry: Registry, field: str) -> None:
        """Raise ProgramError ROW_LOCKED if what a program writes could add up to what locked rows span."""
        if not len(self.span):
            return
        together = "taken together, what it adds lies along the locked rows (docs/policies.md has the bound)"
        for phase in ("prompt", "generated"):
            reached = reaches(writes_of(compiled.sites, registry, phase), self.span)
            require(not reached, field, together, "ROW_LOCKED")


NO_LIMITS = EditLimits()
# The program of a stage in which nothing runs.
NOTHING = Compiled((), "", (), in_sequence=False, by_phase=False)


def compile_program(
    program: program_pb2.Program, registry: Registry, *, limits: EditLimits = NO_LIMITS, field: str = "program"
) -> Compiled:
    """Resolve and check a program. Raises ProgramError, which names the field at fault below `field`."""
    require(program.sites, f"{field}.sites", "is empty: the program changes nothing")
    count = sum(len(part.edits) + part.HasField("blend") for part in program.sites)
    checked_name(program.name, registry, f"{field}.name")
    require(count <= registry.max_edits, f"{field}.sites", f"has {count} edits, more than {registry.max_edits}")
    gate_site = site_number(program.gate.site, registry, f"{field}.gate.site") if program.HasField("gate") else None
    sites = {} if gate_site is None else {gate_site: wire.Site(gate_site)}
    check_gate_rows(program, registry, limits, f"{field}.gate")
    names: list[EditName] = []
    for index, (part, part_field) in sorted(parts_by_site(program, registry, gate_site, field).items()):
        limits.check_site(index, registry, f"{part_field}.site")
        sites[index], site_names = compile_site(index, part, registry, limits, part_field)
        names += site_names
    if gate_site is not None:
        sites[gate_site] = with_gate(sites[gate_site], program.gate, registry, f"{field}.gate")
    ordered = tuple(sites[index] for index in sorted(sites))
    check_capacity([ordered], registry, f"{field}.sites")
    by_phase = any(site.phases_differ() for site in ordered)
    return Compiled(
        ordered, digest_of(ordered, registry), tuple(names), program.gate.HasField("sequence"), by_phase,
        gate_site=program.gate.site,
    )  # fmt: skip


Parts = dict[int, tuple[program_pb2.SiteEdits, str]]


def parts_by_site(program: program_pb2.Program, registry: Registry, gate_site: int | None, field: str) -> Parts:
    """Map site numbers to the program's SiteEdits and their field paths."""
    parts: Parts = {}
    for i, part in enumerate(program.sites):
        part_field = f"{field}.sites[{i}]"
        index = site_number(part.site, registry, f"{part_field}.site")
        require(index not in parts, f"{part_field}.site", f"{part.site} is named twice")
        require(part.edits or part.HasField("blend"), part_field, "has no edits and no blend")
        late = f"{part.site} comes before the gate's site {program.gate.site}"
        require(gate_site is None or index >= gate_site, f"{part_field}.site", late)
        parts[index] = part, part_field
    return parts


def compile_site(
    index: int, part: program_pb2.SiteEdits, registry: Registry, limits: EditLimits, field: str
) -> tuple[wire.Site, list[EditName]]:
    """Compile the edits of one site; return its wire form and the names of its edits."""
    rows: dict[wire.Row, int] = {}
    edits, names, targets = [], [], []
    for i, message in enumerate(part.edits):
        edit_field = f"{field}.edits[{i}]"
        target = resolve(message.row, part.site, registry, f"{edit_field}.row")
        check_editable(target, message, edit_field)
        limits.check_row(target.row, target.name, registry, f"{edit_field}.row")
        edits.append(compile_edit(message, append_row(rows, target.row), target, edit_field))
        names.append(EditName(part.site, target.name, describe_edit(message)))
        targets.append(target.row)
    check_unique_edits(targets, edits, field)
    blend = None
    if part.HasField("blend"):
        target = blend_target(part.blend, part.site, registry, f"{field}.blend")
        if part.blend.WhichOneof("target") == "vector":
            limits.check_row(target.row, target.name, registry, f"{field}.blend.vector")
        blend = compile_blend(part.blend, append_row(rows, target.row), f"{field}.blend")
        names.append(EditName(part.site, target.name, f"blend {blend.weight:g}"))
    cap = min(displacement_cap(part, f"{field}.max_displacement"), limits.max_displacement)
    return wire.Site(index, tuple(rows), tuple(edits), blend, part.restore_norm, cap), names


def check_gate_rows(program: program_pb2.Program, registry: Registry, limits: EditLimits, field: str) -> None:
    """Raise ProgramError ROW_LOCKED if the gate reads a locked row: what it counts would tell the row's activations."""
    gate = program.gate
    rows: list[tuple[str, program_pb2.Row]] = [(f"any_of[{i}].row", t.row) for i, t in enumerate(gate.any_of)]
    rows += [("sequence.score", gate.sequence.score)] if gate.HasField("sequence") else []
    for path, row in rows if not limits.reads_locked else ():
        target = resolve(row, gate.site, registry, f"{field}.{path}")
        limits.check_row(target.row, target.name, registry, f"{field}.{path}")


def check_editable(target: Resolved, message: program_pb2.Edit, field: str) -> None:
    """Raise ProgramError if the row has no decoder to edit along, or cannot take this operation."""
    operation = message.WhichOneof("operation")
    require(operation, f"{field}.operation", "names no operation")
    require(not target.watched_only, f"{field}.row", f"{target.name}: {target.watched_only}")
    require(target.norm > 0, f"{field}.row", f"{target.name} has no direction to move along")
    if not target.reads:
        require(
            operation in OPERATIONS_ON_VECTORS,
            f"{field}.{operation}",
            "a vector has no activation: it takes add or set",
        )
        require(not message.HasField("when_above"), f"{field}.when_above", "a vector has no activation")


def compile_edit(message: program_pb2.Edit, row: int, target: Resolved, field: str) -> wire.Edit:
    """Compile one edit of the row with number `row`."""
    operation = message.WhichOneof("operation") or ""
    numbers = OPERATIONS[operation](operand(message, operation, target, field))
    above = numbers.pop("above", -inf)
    if message.HasField("when_above"):
        above = max(above, number(message.when_above, f"{field}.when_above"))
    prompt, generated = phases(message.phase, f"{field}.phase")
    relative = message.unit == program_pb2.UNIT_RESIDUAL_NORM
    return wire.Edit(row, **numbers, above=above, relative=relative, prompt=prompt, generated=generated)


def operand(message: program_pb2.Edit, operation: str, target: Resolved, field: str) -> float:
    """Convert the operation's value to activation units.

    With UNIT_RESIDUAL_NORM: to residual norms, such that the displacement does not depend on the decoder's norm.
    """
    field_unit, value = f"{field}.unit", getattr(message, operation)
    require(value is not False, f"{field}.ablate", "must be true")
    require(message.unit in UNIT_NAMES, field_unit, f"{message.unit} is no unit")
    absolute = not UNIT_NAMES[message.unit]
    require(absolute or operation not in OPERATIONS_WITHOUT_UNIT, field_unit, f"{operation} has none")
    scale = 1.0
    if message.unit == program_pb2.UNIT_MAX_ACTIVATION:
        require(target.maximum > 0, field_unit, f"{target.name} has no maximum activation")
        scale = target.maximum
    if message.unit == program_pb2.UNIT_RESIDUAL_NORM:
        scale = 1.0 / target.norm
    return number(number(float(value), f"{field}.{operation}") * scale, f"{field}.{operation}")


def compile_blend(message: program_pb2.Blend, row: int, field: str) -> wire.Blend:
    """Compile a blend towards the decoder of the row with number `row`."""
    require(0 <= message.weight <= 1, f"{field}.weight", f"{message.weight:g} is not in [0, 1]")
    return wire.Blend(row, message.weight, *phases(message.phase, f"{field}.phase"))


def displacement_cap(part: program_pb2.SiteEdits, field: str) -> float:
    """Return the cap on the displacement as a share of ||x||; inf without one."""
    if not part.HasField("max_displacement"):
        return inf
    require(part.max_displacement > 0, field, f"{part.max_displacement:g} is not above 0")
    return number(part.max_displacement, field)


def phases(phase: program_pb2.Phase, field: str) -> tuple[bool, bool]:
    """Return (edits prompt tokens, edits generated tokens)."""
    require(phase in PHASES, field, f"{phase} is no phase")
    return PHASES[phase]


def check_unique_edits(targets: list[wire.Row], edits: list[wire.Edit], field: str) -> None:
    """Raise ProgramError if two edits of one row apply to the same tokens."""
    first_edit: dict[tuple[wire.Row, str], int] = {}
    for i, (target, edit) in enumerate(zip(targets, edits, strict=True)):
        for phase in ("prompt", "generated"):
            if getattr(edit, phase):
                first = first_edit.setdefault((target, phase), i)
                require(first == i, f"{field}.edits[{i}].row", f"is edited by edits[{first}] at the same tokens")


def describe_edit(message: program_pb2.Edit) -> str:
    """Format an edit's operation, such as `clamp -2 residual norms`."""
    operation = message.WhichOneof("operation") or ""
    value = "" if operation == "ablate" else f" {getattr(message, operation):g}"
    return f"{operation}{value}{UNIT_NAMES[message.unit]}"


def digest_of(sites: tuple[wire.Site, ...], registry: Registry) -> str:
    """Compute SHA-256 over sites by name and rows by their bundle's hash."""

    def identified(row: wire.Row) -> wire.Row:
        return msgspec.structs.replace(row, bundle=registry.dictionaries[row.bundle].sha256) if row.bundle else row

    canonical = [
        (
            registry.layout.sites[site.site],
            msgspec.structs.replace(site, site=0, rows=tuple(map(identified, site.rows))),
        )
        for site in sites
    ]
    return hashlib.sha256(msgspec.msgpack.encode(canonical)).hexdigest()
