"""Reference implementation of the bank, one token and one row at a time in float64, and random programs.

Numbers come from a grid that fp32 represents exactly, so that strict comparisons agree in both precisions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import reject
from numpy.typing import NDArray

from rudder.sae_models.sae import SAE
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program import wire
from rudder.server.program.layout import Layout

Floats = NDArray[np.float64]
WIDTH = 8
LATENTS = 12
BUNDLE = "toy"
TINY = 1e-12
CPU = torch.device("cpu")


def grid(rng: Random, *shape: int, step: float = 0.5, top: int = 2) -> Floats:
    """Return random multiples of `step` up to `top` steps."""
    count = int(np.prod(shape))
    return np.array([rng.randint(-top, top) * step for _ in range(count)], np.float64).reshape(shape)


def toy_sae(rng: Random) -> SAE:
    """Return an SAE with numbers on the grid."""
    encoder, decoder, bias = grid(rng, LATENTS, WIDTH), grid(rng, LATENTS, WIDTH), grid(rng, LATENTS)
    threshold = np.abs(grid(rng, LATENTS))
    tensors = (torch.tensor(a, dtype=torch.float32) for a in (encoder, bias, threshold, decoder, np.zeros(WIDTH)))
    return SAE(*tensors)


def make_driver(
    layout: Layout, sae: SAE, max_tokens: int = 48, width: int = WIDTH, device: torch.device = CPU
) -> Driver:
    """Return a driver with banks built like in the worker."""
    driver = Driver(layout, build_banks(layout, width, max_tokens, device))
    driver.load_sae(BUNDLE, sae.to(device))
    return driver


def run_step(
    driver: Driver, chunks: Sequence[tuple[str, int, int]], xs: Mapping[str, Floats], padding: int = 2
) -> dict[str, Floats]:
    """Run a forward pass over chunks (request, start, tokens); return each request's displacement [sites, tokens, d].

    xs [sites, all tokens, d] of each request. Padding tokens hold NaN, like an uninitialised buffer may.
    """
    ids = [request_id for request_id, _, _ in chunks]
    starts, lengths = (np.array([c[i] for c in chunks], np.int64) for i in (1, 2))
    driver.write_token_metadata(ids, starts, lengths)
    moves: dict[str, list[Floats]] = {request_id: [] for request_id in ids}
    for site, bank in enumerate(driver.banks):
        parts = [xs[i][site, start : start + length] for i, start, length in chunks]
        x = torch.tensor(np.concatenate([*parts, np.full((padding, WIDTH), np.nan)]), dtype=torch.float32)
        move = bank(x.to(bank.encoder.device)).cpu().double().numpy()
        for (request_id, _, length), offset in zip(chunks, np.cumsum(lengths) - lengths, strict=True):
            moves[request_id].append(move[offset : offset + length])
    return {request_id: np.stack(parts) for request_id, parts in moves.items()}


@dataclass
class Trace:
    """Expected result of one request: displacement [sites, tokens, d], edits that touched tokens, and open gates.

    `touched`: (stage, site, edit, token). `is_open`: by (stage, token).
    """

    moved: Floats
    touched: list[tuple[int, wire.Site, int, int]] = field(default_factory=list)
    is_open: dict[tuple[int, int], bool] = field(default_factory=dict)


@dataclass
class State:
    """The state of a gate after earlier tokens."""

    scores: list[float] = field(default_factory=list)
    value: float = 0.0
    latched: bool = False
    exact: bool = True


def by_definition(request: wire.Request, x: Floats, sae: SAE) -> Trace:
    """Compute every token of a request, x [sites, tokens, d], by a loop over tokens and rows."""
    trace = Trace(np.zeros_like(x))
    states = [State() for _ in request.stages]
    rows = {row: vectors(row, sae) for _, row in request.rows()}
    for t in range(x.shape[1]):
        if (request.bos and t == 0) or t in request.excluded:
            continue
        for stage, sites in enumerate(request.stages):
            gate_open = True
            for site in sorted(sites, key=lambda s: s.site):
                y = x[site.site, t] + trace.moved[site.site, t]
                # After another stage's edits x is no longer on the grid.
                exact = not trace.moved[site.site, t].any()
                here = [rows[row] for row in site.rows]
                f = [activation(row, y, exact) for row in here]
                if site.gate:
                    gate_open = gate_holds(site.gate, f, states[stage], exact)
                    trace.is_open[stage, t] = gate_open
                force = Force(gate_open, t < request.prompt_tokens, exact)
                move, touched = edited(site, y, f, here, force)
                trace.moved[site.site, t] += move
                trace.touched += [(stage, site, number, t) for number in touched]
    return trace


class RowVectors(NamedTuple):
    """The numbers of an SAE row."""

    encoder: Floats
    bias: float
    threshold: float
    decoder: Floats


class Force(NamedTuple):
    """The conditions at a token. `exact`: fp32 computes its activations without rounding."""

    gate_open: bool
    prompt: bool
    exact: bool

    def covers(self, part: wire.Edit | wire.Blend) -> bool:
        """Return whether an edit or blend is in force."""
        return self.gate_open and (part.prompt if self.prompt else part.generated)


def vectors(row: wire.Row, sae: SAE) -> RowVectors:
    """Return the numbers of a row."""
    if row.bundle:
        encoder, bias, threshold, decoder = (
            t[row.latent].double().numpy() for t in sae.exact_rows(torch.arange(sae.latents))
        )
        return RowVectors(encoder, float(bias), float(threshold), decoder)
    raw = [np.frombuffer(b, "<f4").astype(np.float64) if b else np.zeros(WIDTH) for b in (row.encoder, row.decoder)]
    return RowVectors(raw[0], row.bias, row.threshold, raw[1])


def activation(row: RowVectors, y: Floats, exact: bool) -> float:
    """Return the activation of a row."""
    z = float(y @ row.encoder) + row.bias
    if not exact and row.encoder.any() and abs(z - row.threshold) < 1e-5:
        reject()
    return z if clearly_above(z, row.threshold, exact) else 0.0


def clearly_above(value: float, bound: float, exact: bool) -> bool:
    """Return value > bound; reject examples that fp32 may decide differently."""
    certain = value == bound and (exact or value == 0)
    if not certain and abs(value - bound) < 1e-5 * max(1.0, abs(value)):
        reject()
    return value > bound


def edited(
    site: wire.Site, y: Floats, f: list[float], rows: list[RowVectors], force: Force
) -> tuple[Floats, list[int]]:
    """Return a token's displacement at a site, and the edits that moved it; the blend's index follows the last edit."""
    norm = max(float(np.linalg.norm(y)), TINY)
    new_y, touched = y.copy(), []
    for number, edit in enumerate(site.edits):
        before = f[edit.row]
        if force.covers(edit) and clearly_above(before, edit.above, force.exact):
            unit = norm if edit.relative else 1.0
            new = min(max(edit.scale * before + edit.shift * unit, edit.lower * unit), edit.upper * unit)
            new_y = new_y + (new - before) * rows[edit.row].decoder
            touched += [number] if abs(new - before) > 1e-6 else []
    blend = site.blend
    if blend and force.covers(blend) and blend.weight > 0:
        new_y = new_y + blend.weight * (rows[blend.row].decoder - new_y)
        touched.append(len(site.edits))
    if site.restore_norm:
        well_posed(new_y, norm)
        new_y = new_y * (norm / max(float(np.linalg.norm(new_y)), TINY))
    move = new_y - y
    if np.isfinite(site.max_displacement) and move.any():
        well_posed(move, norm)
        move = move * min(1.0, site.max_displacement * norm / max(float(np.linalg.norm(move)), TINY))
    return move, touched


def well_posed(vector: Floats, norm: float) -> None:
    """Reject examples that would scale up a difference which is only rounding."""
    length = float(np.linalg.norm(vector))
    if 0 < length < 1e-3 * norm or (length == 0 and norm > TINY):
        reject()


def gate_holds(gate: wire.Gate, f: list[float], state: State, exact: bool) -> bool:
    """Return whether the gate is open at a token, and count the token."""
    above = [clearly_above(f[row], bound, exact) for row, bound in gate.triggers]
    in_sequence = not gate.sequence or sequence_holds(gate.sequence, f[gate.sequence.score], state, exact)
    return in_sequence and (any(above) or not above)


def sequence_holds(s: wire.Sequence, score: float, state: State, exact: bool) -> bool:
    """Return whether the sequence condition holds, by the definition of its statistic, and count the token."""
    u = score if s.binary is None else float(clearly_above(score, s.binary, exact))
    state.exact &= exact or s.binary is not None
    state.scores.append(u)
    state.value = max(s.floor, s.decay * state.value + s.gain * u + s.offset)
    recent = state.scores[-s.window :] if s.window else []
    statistic = sum(recent) / len(recent) if recent else state.value
    count = len(state.scores)
    alarm = clearly_above(statistic, s.level + s.level_rate * count, state.exact) and count >= s.min_tokens
    state.latched |= alarm
    return state.latched if s.latch else alarm


def random_row(rng: Random, reads: bool, writes: bool) -> wire.Row:
    """Return a latent, a probe, a vector, or a raw row with both encoder and decoder."""
    if rng.random() < 0.6:
        return wire.Row(bundle=BUNDLE, latent=rng.randrange(LATENTS))
    encoder = grid(rng, WIDTH).astype("<f4").tobytes() if reads else b""
    decoder = grid(rng, WIDTH).astype("<f4").tobytes() if writes else b""
    return wire.Row(
        encoder=encoder, decoder=decoder, bias=rng.choice((0.0, 0.5)), threshold=rng.choice((-inf, 0.0, 0.5))
    )


def random_edit(rng: Random, row: int) -> wire.Edit:
    """Return an edit with a random operation, unit and phase."""
    value = rng.randint(-6, 6) * 0.25
    formula = rng.choice(
        (
            {"shift": value},
            {"scale": 0.0, "shift": value},
            {"scale": 0.0},
            {"scale": value},
            {"upper": value},
            {"lower": value},
            {"scale": 0.0, "shift": value, "above": rng.choice((0.0, 0.5))},
            {"scale": value, "shift": 0.5, "lower": -1.0, "upper": 1.0, "above": -0.5},
        )
    )
    prompt, generated = rng.choice(((True, True), (True, False), (False, True)))
    return wire.Edit(row, **formula, relative=rng.random() < 0.3, prompt=prompt, generated=generated)


def random_sequence(rng: Random, score: int, window: int) -> wire.Sequence:
    """Return a sequence condition with a random statistic."""
    statistic: dict[str, Any] = rng.choice(
        (
            {"binary": rng.choice((0.0, 0.5)), "level_rate": rng.choice((0.125, 0.25, 0.5))},
            {"decay": 0.75, "gain": 0.25, "level": rng.choice((0.0, 0.25))},
            {"offset": -rng.choice((0.25, 0.5)), "floor": 0.0, "level": rng.choice((0.5, 1.0))},
            {"window": rng.randint(1, window), "level": rng.choice((0.0, 0.25, 0.5))},
        )
    )
    return wire.Sequence(score, **statistic, min_tokens=rng.randrange(4), latch=rng.random() < 0.5)


def random_site(rng: Random, number: int, gate: str, window: int) -> wire.Site:
    """Return a site with up to three edits; `gate`: '' or any of the letters t(oken) and s(equence)."""
    rows = list(dict.fromkeys(random_row(rng, reads=rng.random() < 0.7, writes=True) for _ in range(rng.randint(1, 3))))
    edits = tuple(random_edit(rng, i) for i in range(len(rows)))
    blend = None
    if rng.random() < 0.3:
        rows.append(wire.Row(decoder=grid(rng, WIDTH).astype("<f4").tobytes(), copy=1))
        blend = wire.Blend(len(rows) - 1, rng.choice((0.0, 0.25, 1.0)), *rng.choice(((True, True), (True, False))))
    indices = {row: i for i, row in enumerate(rows)}
    readers = [indices.setdefault(random_row(rng, True, False), len(indices)) for _ in range(2 if gate else 0)]
    triggers = (
        tuple(dict.fromkeys((row, rng.choice((0.0, 0.5))) for row in dict.fromkeys(readers))) if "t" in gate else ()
    )
    sequence = random_sequence(rng, readers[-1], window) if "s" in gate else None
    return wire.Site(
        number,
        tuple(indices),
        edits,
        blend,
        restore_norm=rng.random() < 0.2,
        max_displacement=rng.choice((inf, inf, 0.5)),
        gate=wire.Gate(triggers, sequence) if gate else None,
    )


def random_stage(rng: Random, layout: Layout, gates: Sequence[str] = ("", "t", "s", "ts")) -> tuple[wire.Site, ...]:
    """Return a program over some of the sites, with its gate at the first."""
    numbers = sorted(rng.sample(range(len(layout.sites)), rng.randint(1, len(layout.sites))))
    gate = rng.choice(tuple(gates))
    return tuple(random_site(rng, n, gate if n == numbers[0] else "", layout.window) for n in numbers)


def random_request(
    rng: Random, layout: Layout, tokens: int, gates: Iterable[str] = ("", "t", "s", "ts")
) -> wire.Request:
    """Return a request of `tokens` tokens in all, with a program in each stage or none, and excluded positions."""
    stages = tuple(random_stage(rng, layout, tuple(gates)) if rng.random() < 0.8 else () for _ in range(layout.stages))
    return wire.Request(
        rng.randint(1, tokens), tokens, rng.random() < 0.5, stages, excluded=random_positions(rng, tokens)
    )


def random_positions(rng: Random, tokens: int) -> tuple[int, ...]:
    """Return excluded positions before `tokens`: none, some at the start, or some anywhere."""
    anywhere = rng.sample(range(tokens), rng.randint(0, tokens // 2))
    return tuple(rng.choice(((), range(rng.randint(1, 3)), sorted(anywhere), sorted(anywhere))))
