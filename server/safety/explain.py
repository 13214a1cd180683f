"""What binds a caller, in sentences that an operator or a caller can read."""

from collections.abc import Iterator
from math import isfinite

from rudder.server.program.rows import Registry
from rudder.server.safety.binding import Binding
from rudder.server.safety.guards import ACTIONS
from rudder.server.safety.policy import Policy

# What a caller with a right may do; without it, what it may not.
RIGHT_TEXTS = {
    "edit_latents": "run programs of its own on latents",
    "raw_vectors": "use vectors and probes of its own",
    "edit_behind_policy": "edit behind the first site that a policy edits",
    "edit_before_guard": "edit where it changes what gates and guards read",
    "read_guards": "read locked rows and scores of guards",
}


def statements(binding: Binding, registry: Registry) -> list[str]:
    """Return one sentence for each thing that the policies do, lock and forbid, in the order in which they apply."""
    if not binding.policies:
        return ["No policy binds this caller."]
    return [
        *(sentence for policy in binding.policies for sentence in of_policy(policy, registry)),
        *(together(binding, registry) if binding.enforced else ()),
    ]


def of_policy(policy: Policy, registry: Registry) -> Iterator[str]:
    """Yield what one policy does."""
    name, mode = repr(policy.name), ""
    if policy.shadow:
        mode = " in shadow mode: it counts what it would do, and changes nothing"
    yield f"Policy {name}, version {policy.version}, binds this caller{mode}."
    if sites := edited_sites(policy, registry):
        yield f"It edits {', '.join(sites)} behind the request's own program{gate_of(policy)}."
    for guard in policy.guards:
        read = ", ".join(dict.fromkeys(registry.layout.sites[row.site] for row in guard.rows)) or "token ids"
        phases = [phase for phase, judged in (("prompt", guard.prompt), ("generated", guard.generated)) if judged]
        judges = f"judges {' and '.join(phases)} tokens by {read}"
        yield f"Guard {guard.name!r} of {name} {judges}; its action is {ACTIONS[guard.action]}."


def edited_sites(policy: Policy, registry: Registry) -> list[str]:
    """Return the sites that a policy edits, in forward order."""
    parts = [site for program in policy.programs for site in program.sites]
    return [registry.layout.sites[n] for n in sorted({part.site for part in parts if part.edits or part.blend})]


def gate_of(policy: Policy) -> str:
    """Say when the program of a policy runs."""
    if policy.program is None:
        return ", once a guard has asked for it"
    return ", where its gate is open" if policy.program.gate_site else ""


def together(binding: Binding, registry: Registry) -> Iterator[str]:
    """Yield what the enforced policies leave to the caller."""
    limits, sites = binding.limits, registry.layout.sites
    yield "This caller may run the server's programs that have names, within what follows."
    for right, text in RIGHT_TEXTS.items():
        yield f"It {'may' if right in binding.rights else 'may not'} {text}."
    if "raw_vectors" in binding.rights and not binding.reads_by_probes:
        yield "It may not use probes of its own: together they would read what guards read."
    if limits.first_site:
        yield (
            f"It may not edit before {sites[limits.first_site]}."
            if limits.first_site < len(sites)
            else "It may edit no site."
        )
    if limits.last_site is not None:
        yield f"It may not edit behind {sites[limits.last_site]}."
    if limits.locked:
        by_bundle = {
            name: sorted(i for n, i in limits.locked if n == name) for name in sorted({n for n, _ in limits.locked})
        }
        listed = "; ".join(f"{', '.join(map(str, latents))} of {name}" for name, latents in by_bundle.items())
        yield f"Locked are the latents {listed}, and whatever is parallel to them."
    if isfinite(limits.max_displacement):
        yield f"Its programs displace the residual by at most {limits.max_displacement:g} of its norm at each site."
    for path, name in sorted(binding.forbidden.items()):
        yield f"Policy {name!r} forbids the field {path}."
