"""A policy as it runs, and how it is compiled from its message: every problem is named, not the first one."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path

import msgspec
import numpy as np
from google.protobuf import json_format

from rudder.server.program import wire
from rudder.server.program.compile import NO_LIMITS, Compiled, compile_program, compile_site, digest_of
from rudder.server.program.gates import with_gate
from rudder.server.program.rows import (
    NO_LOCKED_ROWS,
    Floats,
    LockedRows,
    Registry,
    parallel_latents,
    resolve,
    row_directions,
    site_number,
)
from rudder.server.program.watch import Watched, compile_watch
from rudder.server.safety.fields import is_request_field, submessages
from rudder.server.safety.guards import CLAMP, CLAMP_FROM_START, Guard, compile_guard
from rudder.server.safety.problems import PolicyInvalid, Problem, Problems
from rudder.v1 import policy_pb2, program_pb2

SHADOW = policy_pb2.POLICY_MODE_SHADOW
# What a bound caller's program may add at a site, as a share of ||x||, where a policy says nothing else. Beside an edit
# near the limit of the bank a policy's own edit would not fit, and would be rejected.
MAX_DISPLACEMENT = 1.0
# Fields that a removal may have.
OF_REMOVALS = frozenset({"name", "description", "version", "removed"})


@dataclass(frozen=True, eq=False)
class Policy:
    """A compiled policy.

    `digest`: SHA-256 of the message in canonical form. `program`: what runs behind a bound request's own program, None
    if nothing does; in shadow mode it moves nothing and is counted. `forced`: the program without its gate, with which
    a guard runs a prompt again from the start. `locked`: latents that bound callers neither edit nor read; `hidden`:
    these, and latents parallel to a locked row, which no report ranks. `directions` [n, d], of length 1: encoders and
    decoders of all locked rows. `watch`: rows counted in Prometheus.
    """

    message: policy_pb2.Policy
    digest: str
    program: Compiled | None = None
    forced: Compiled | None = None
    guards: tuple[Guard, ...] = ()
    locked: LockedRows = NO_LOCKED_ROWS
    hidden: LockedRows = NO_LOCKED_ROWS
    directions: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    watch: tuple[Watched, ...] = ()

    @property
    def name(self) -> str:
        """Its name."""
        return self.message.name

    @property
    def version(self) -> int:
        """Its version."""
        return self.message.version

    @property
    def shadow(self) -> bool:
        """Whether it counts what it would do, and changes nothing."""
        return self.message.mode == SHADOW

    @property
    def max_displacement(self) -> float:
        """Bound of what a bound caller's program adds at a site, as a share of ||x||."""
        return self.message.max_displacement if self.message.HasField("max_displacement") else MAX_DISPLACEMENT

    @cached_property
    def programs(self) -> tuple[Compiled, ...]:
        """The forms in which its program may run: with its gate, and without."""
        return tuple(program for program in (self.program, self.forced) if program)

    @cached_property
    def first_edited_site(self) -> int | None:
        """Number of the first site, in forward order, whose residual it may change."""
        return min((p.first_edited_site for p in self.programs if p.first_edited_site is not None), default=None)

    @cached_property
    def first_unread_site(self) -> int:
        """Number of the first site at which an edit cannot change what its gate and its guards read.

        A gate reads what a request's own edits leave at its site, guards what they find there.
        """
        gates = [program.site_behind_gate for program in self.programs]
        return max([*gates, *(row.site for guard in self.guards for row in guard.rows)], default=0)

    @cached_property
    def rows(self) -> dict[int, tuple[wire.Row, ...]]:
        """Rows that its calls need, by site number, in the order in which they are first named."""
        rows: dict[int, dict[wire.Row, None]] = {}
        for site in (site for program in self.programs for site in program.sites):
            rows.setdefault(site.site, {}).update(dict.fromkeys(site.rows))
        for watched in (*(row for guard in self.guards for row in guard.rows), *self.watch):
            rows.setdefault(watched.site, {})[watched.row] = None
        return {site: tuple(rows[site]) for site in sorted(rows)}


def digest_of_message(message: policy_pb2.Policy) -> str:
    """Compute SHA-256 of a policy's JSON form with sorted keys."""
    document = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def compile_policy(message: policy_pb2.Policy, registry: Registry, folder: Path, source: str = "") -> Policy:
    """Compile a policy. `folder` has the files of its token models; `source` names it in errors, its name by default.

    Raises PolicyInvalid with every problem.
    """
    problems = Problems()
    check_fields(message, registry, problems)
    if message.removed and not problems.found:
        return Policy(message, digest_of_message(message))
    check_bundles(message, registry, problems)
    guards = compile_guards(message, registry, folder, problems)
    locked_rows = locked_features(message, registry, problems)
    watch: tuple[Watched, ...] = ()
    for number, feature in enumerate(message.watch):
        problems.require(feature.row.HasField("feature"), f"watch[{number}].row", "is no latent")
        with problems.collected("watch[0]", f"watch[{number}]"):
            watch += compile_watch([(feature.site, feature.row)], registry, "watch")
    program, forced = compile_programs(message, registry, problems)
    if problems.found:
        raise PolicyInvalid(source or f"policy {message.name!r}", problems.found)
    policy = Policy(message, digest_of_message(message), program, forced, guards, watch=watch)
    named = [*locked_rows, *touched_rows(policy)]
    locked, directions = frozenset((r.bundle, r.latent) for r in named if r.bundle), row_directions(named, registry)
    hidden = locked | parallel_latents(directions, registry)
    return replace(policy, locked=locked, hidden=hidden, directions=directions)


def problems_of(message: policy_pb2.Policy, registry: Registry, folder: Path) -> list[Problem]:
    """Return all that is wrong with a policy; empty if it can be compiled."""
    try:
        compile_policy(message, registry, folder)
    except PolicyInvalid as invalid:
        return invalid.problems
    return []


def touched_rows(policy: Policy) -> Iterator[wire.Row]:
    """Yield the rows that a policy edits and that its gate and guards read. A blend's target is none of them."""
    for program in policy.programs:
        for site in program.sites:
            yield from (site.rows[edit.row] for edit in site.edits)
            if site.gate:
                numbers = [row for row, _ in site.gate.triggers]
                yield from (site.rows[row] for row in numbers)
                if site.gate.sequence:
                    yield site.rows[site.gate.sequence.score]
    yield from (watched.row for guard in policy.guards for watched in guard.rows)


def check_fields(message: policy_pb2.Policy, registry: Registry, problems: Problems) -> None:
    """Check what needs no compilation: name, version, mode, forbidden fields, displacement, names of guards."""
    longest = registry.max_name_chars
    problems.require(message.name, "name", "is empty")
    problems.require(len(message.name) <= longest, "name", f"has {len(message.name)} characters, at most {longest}")
    problems.require(message.version >= 1, "version", "must be at least 1")
    for name in (part.name for part, _ in message.ListFields()) if message.removed else ():
        problems.require(name in OF_REMOVALS, name, "is set: a removal has a name and a version")
    problems.require(message.mode in policy_pb2.PolicyMode.values(), "mode", f"{message.mode} is no mode")
    for number, path in enumerate(message.forbidden_fields):
        problems.require(is_request_field(path), f"forbidden_fields[{number}]", f"{path!r} is not a field of a request")
    cap = message.max_displacement
    bounded = not message.HasField("max_displacement") or 0 < cap < inf
    problems.require(bounded, "max_displacement", f"{cap:g} is not a finite number above 0")
    names = [guard.name for guard in message.guards]
    for number, name in enumerate(names):
        problems.require(name, f"guards[{number}].name", "is empty")
        problems.require(names.index(name) == number, f"guards[{number}].name", f"{name!r} names two guards")


def check_bundles(message: policy_pb2.Policy, registry: Registry, problems: Problems) -> None:
    """Check that each bundle whose latents the policy names is pinned, by the hash of the one that is served.

    The number of a latent means nothing outside its bundle.
    """
    for name, sha256 in sorted(message.bundles.items()):
        served = registry.dictionaries.get(name)
        field = f"bundles[{name}]"
        if served is None:
            problems.add(field, f"is not served; served: {', '.join(registry.dictionaries) or 'none'}")
        else:
            problems.require(sha256 == served.sha256, field, f"is {sha256!r}, the bundle served has {served.sha256!r}")
    for path, named in named_bundles(message):
        problems.require(named, f"{path}.bundle", "is empty: a policy names the bundle of each latent")
        pinned = not named or named in message.bundles
        problems.require(pinned, f"{path}.bundle", f"{named!r} is not in `bundles`, which pins its hash")


def named_bundles(message: policy_pb2.Policy) -> Iterator[tuple[str, str]]:
    """Yield (path, bundle) of every latent, and of every blend with a bundle's mean, that a policy names."""
    for path, part in submessages(message):
        if isinstance(part, program_pb2.Feature) or (
            isinstance(part, program_pb2.Blend) and part.WhichOneof("target") != "vector"
        ):
            yield path, part.bundle


def compile_guards(
    message: policy_pb2.Policy, registry: Registry, folder: Path, problems: Problems
) -> tuple[Guard, ...]:
    """Compile the guards that can be compiled, and note the problems of the others."""
    guards: tuple[Guard, ...] = ()
    for number, guard in enumerate(message.guards):
        with problems.collected():
            guards += (compile_guard(guard, registry, folder, f"guards[{number}]"),)
    return guards


def locked_features(message: policy_pb2.Policy, registry: Registry, problems: Problems) -> list[wire.Row]:
    """Return the rows of the field `locked`."""
    rows = []
    for number, feature in enumerate(message.locked):
        field = f"locked[{number}]"
        with problems.collected():
            site_number(feature.site, registry, f"{field}.site")
            rows.append(resolve(feature.row, feature.site, registry, f"{field}.row").row)
    return rows


def compile_programs(
    message: policy_pb2.Policy, registry: Registry, problems: Problems
) -> tuple[Compiled | None, Compiled | None]:
    """Return the program as it runs, and without its gate; None each if there is none or nothing runs it."""
    clamps = clamping(message.guards, (CLAMP, CLAMP_FROM_START))
    if not message.HasField("program"):
        for number, _ in clamps:
            problems.add(f"guards[{number}].action", "clamps, and the policy has no program")
        return None, None
    in_graph = clamping(message.guards, (CLAMP,))
    program = with_clamp(message.program, in_graph, problems)
    found = len(problems.found)
    program_problems(message.program, registry, problems)
    if len(problems.found) > found:
        return None, None
    compiled = forced = None
    with problems.collected():
        compiled = compile_program(program, registry)
        if in_graph:
            compiled = binarised(compiled, message.guards[in_graph[0][0]], registry)
        if len(clamps) > len(in_graph):
            ungated = program_pb2.Program()
            ungated.CopyFrom(message.program)
            ungated.ClearField("gate")
            forced = compile_program(ungated, registry)
            # Without a gate it is what the guard opens.
            compiled = compiled if program.HasField("gate") else None
    if message.mode == SHADOW:
        return shadow_of(compiled, registry), None if compiled else shadow_of(forced, registry)
    return compiled, forced


def clamping(
    guards: Iterable[policy_pb2.Guard], actions: Sequence["policy_pb2.GuardAction"]
) -> list[tuple[int, policy_pb2.Guard]]:
    """Return the guards with one of these actions, with their numbers."""
    return [(number, guard) for number, guard in enumerate(guards) if guard.action in actions]


def with_clamp(
    program: program_pb2.Program, clamps: Sequence[tuple[int, policy_pb2.Guard]], problems: Problems
) -> program_pb2.Program:
    """Return the program with the guard that clamps as the sequence condition of its gate, which latches.

    A token's own score is the mean of a window of one token. What the graph cannot evaluate is a problem.
    """
    gated = program_pb2.Program()
    gated.CopyFrom(program)
    for number, guard in clamps:
        field, (term, *others) = f"guards[{number}]", (*guard.score.terms, policy_pb2.ScoreTerm())
        one_row = len(others) == 1 and not guard.score.HasField("token_model")
        problems.require(one_row, f"{field}.score", "a guard that clamps reads one row: it runs in the graph")
        plain = term.weight == 1 and guard.score.bias == 0
        problems.require(plain, f"{field}.score", "a guard that clamps has weight 1 and bias 0: move them to its row")
        both = guard.phase in (program_pb2.PHASE_UNSPECIFIED, program_pb2.PHASE_BOTH)
        problems.require(both, f"{field}.phase", "a guard that clamps judges both phases")
        problems.require(not gated.gate.HasField("sequence"), f"{field}.action", "the gate has a sequence condition")
        elsewhere = f"reads {term.site}, the gate of the program {gated.gate.site}"
        problems.require(gated.gate.site in ("", term.site), f"{field}.score.terms[0].site", elsewhere)
        gated.gate.site = term.site
        gated.gate.sequence.CopyFrom(sequence_of(guard, term.row))
    return gated


def sequence_of(guard: policy_pb2.Guard, row: program_pb2.Row) -> program_pb2.SequenceCondition:
    """Return a guard as a sequence condition; agreement as a window, which `binarised` completes."""
    condition = program_pb2.SequenceCondition(score=row, level=guard.level, min_tokens=guard.min_tokens, latch=True)
    statistic = guard.WhichOneof("statistic")
    match statistic:
        case None | "agreement":
            condition.window.tokens = guard.agreement.tokens if statistic else 1
        case _:
            getattr(condition, statistic).CopyFrom(getattr(guard, statistic))
    return condition


def binarised(compiled: Compiled, guard: policy_pb2.Guard, registry: Registry) -> Compiled:
    """Let a guard's window of agreement be one over whether scores are above a level."""
    if guard.WhichOneof("statistic") != "agreement":
        return compiled
    return with_sites(
        compiled,
        (
            msgspec.structs.replace(site, gate=with_binary(site.gate, guard.agreement.above)) if site.gate else site
            for site in compiled.sites
        ),
        registry,
    )


def with_binary(gate: wire.Gate, above: float) -> wire.Gate:
    """Let the sequence condition of a gate read whether scores are above a level."""
    assert gate.sequence
    return msgspec.structs.replace(gate, sequence=msgspec.structs.replace(gate.sequence, binary=above))


def shadow_of(compiled: Compiled | None, registry: Registry) -> Compiled | None:
    """Return the program as it runs in shadow mode: what it asks for is counted, and shortened to nothing."""
    if compiled is None:
        return None
    still = (msgspec.structs.replace(site, max_displacement=0.0) for site in compiled.sites)
    return with_sites(compiled, still, registry)


def with_sites(compiled: Compiled, sites: Iterable[wire.Site], registry: Registry) -> Compiled:
    """Return a program with other numbers at its sites, and their digest."""
    changed = tuple(sites)
    return replace(compiled, sites=changed, digest=digest_of(changed, registry))


def program_problems(program: program_pb2.Program, registry: Registry, problems: Problems) -> None:
    """Note the problems of each edit, blend and trigger by itself: compiling the program names the first one."""
    for i, part in enumerate(program.sites):
        at = f"program.sites[{i}]"
        alone = [
            *((f"{at}.edits[{j}]", "edits[0]", program_pb2.SiteEdits(edits=[e])) for j, e in enumerate(part.edits)),
            *([(f"{at}.blend", "blend", program_pb2.SiteEdits(blend=part.blend))] if part.HasField("blend") else []),
        ]
        with problems.collected():
            number = site_number(part.site, registry, f"{at}.site")
            for field, path, single in alone:
                single.site = part.site
                with problems.collected(f"s.{path}", field):
                    compile_site(number, single, registry, NO_LIMITS, "s")
    if program.HasField("gate"):
        gate_problems(program.gate, registry, problems)


def gate_problems(gate: program_pb2.Gate, registry: Registry, problems: Problems) -> None:
    """Note the problems of each trigger and of the sequence condition by itself."""
    with problems.collected():
        site = wire.Site(site_number(gate.site, registry, "program.gate.site"))
        for i, trigger in enumerate(gate.any_of):
            with problems.collected("g.any_of[0]", f"program.gate.any_of[{i}]"):
                with_gate(site, program_pb2.Gate(site=gate.site, any_of=[trigger]), registry, "g")
        if gate.HasField("sequence"):
            with problems.collected("g", "program.gate"):
                with_gate(site, program_pb2.Gate(site=gate.site, sequence=gate.sequence), registry, "g")
