"""Whatever a program asks, the values that leave a site are finite, and no other token of the batch is touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rudder.sae_models.activations.layers import Branch, Reading
from rudder.sae_models.edit import MAX_VALUE
from rudder.sae_models.hookpoints import POINTS
from rudder.server.engine.telemetry.frame import REJECTED
from rudder.server.engine.worker.bank import MAX_MLP_INPUT, SiteBank, value_limit
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.hooks import hook_mlp_input, steered
from rudder.server.engine.worker.reader import Reader
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program import wire
from rudder.server.program.errors import MAX_MAGNITUDE
from rudder.server.program.layout import Layout
from tests.unit.reference import BUNDLE, LATENTS, WIDTH, toy_sae

LAYOUT = Layout(tuple(f"layers.{n}.{point}" for n in range(2) for point in POINTS), rows=32, slots=4, stages=2)
TOKENS = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
seeds = st.integers(0, 2**32 - 1)
thorough = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def driver_for(dtype: torch.dtype, layout: Layout = LAYOUT) -> Driver:
    """A driver with the banks of a model in `dtype`."""
    driver = Driver(layout, build_banks(layout, WIDTH, 64, torch.device("cpu"), dtype=dtype))
    driver.load_sae(BUNDLE, toy_sae(Random(0)))
    return driver


def magnitude(rng: Random) -> float:
    """A number that a program may name, often near the largest."""
    size: float = rng.choice((MAX_MAGNITUDE, 9e29, 1e19, 10.0 ** rng.uniform(-30, 30), rng.uniform(0, 4), 0.0))
    return size * rng.choice((-1, 1))


def vector(rng: Random) -> bytes:
    """A direction whose norm a program may name."""
    values = np.array([rng.gauss(0, 1) for _ in range(WIDTH)])
    norm = rng.choice((1.0, 1e-30, MAX_MAGNITUDE * 0.99, 10.0 ** rng.uniform(-30, 30)))
    return bytes((values / np.linalg.norm(values) * norm).astype("<f4"))


def row(rng: Random, copy: int) -> wire.Row:
    """A latent, a vector, or a row with both vectors."""
    if rng.random() < 0.3:
        return wire.Row(BUNDLE, rng.randrange(LATENTS), copy=copy)
    return wire.Row(encoder=vector(rng) if rng.random() < 0.5 else b"", decoder=vector(rng), copy=copy)


def edit(rng: Random, number: int) -> wire.Edit:
    """Any operation, unit and condition."""
    value = magnitude(rng)
    above = rng.choice((-inf, 0.0, -1.0, magnitude(rng)))
    operation: dict[str, Any] = rng.choice(
        (
            {"shift": value},
            {"scale": 0.0, "shift": value},
            {"scale": 0.0},
            {"scale": value},
            {"upper": value},
            {"lower": value},
        )
    )
    return wire.Edit(number, **operation, above=above, relative=rng.random() < 0.4)


def site(rng: Random, number: int) -> wire.Site:
    """Edits, and perhaps a blend, a restored norm, a cap and a gate."""
    rows = tuple(row(rng, copy) for copy in range(rng.randint(1, 3)))
    return wire.Site(
        number,
        rows,
        tuple(edit(rng, i) for i in range(len(rows))),
        wire.Blend(rng.randrange(len(rows)), rng.choice((0.0, 1e-30, 0.5, 1.0))) if rng.random() < 0.3 else None,
        restore_norm=rng.random() < 0.3,
        max_displacement=rng.choice((inf, inf, 0.5, 1e-30, MAX_MAGNITUDE)),
        gate=wire.Gate(((0, magnitude(rng)),)) if rng.random() < 0.1 else None,
    )


def program(rng: Random) -> wire.Request:
    """A program and a policy on any sites."""
    numbers = range(len(LAYOUT.sites))
    stages = tuple(tuple(site(rng, n) for n in sorted(rng.sample(numbers, rng.randint(0, 4)))) for _ in range(2))
    return wire.Request(rng.randint(1, TOKENS), TOKENS, rng.random() < 0.5, stages)


def tame(request: wire.Request) -> wire.Request:
    """The same rows and edits with small numbers: products over them have the same shape and order of sums."""

    def unit(data: bytes) -> bytes:
        values = np.frombuffer(data, "<f4").astype(np.float64)
        return (values / max(float(np.linalg.norm(values)), 1e-300)).astype("<f4").tobytes()

    def tamed(at: wire.Site) -> wire.Site:
        rows = tuple(msgspec.structs.replace(r, encoder=unit(r.encoder), decoder=unit(r.decoder)) for r in at.rows)
        return wire.Site(at.site, rows, tuple(wire.Edit(e.row, shift=0.1) for e in at.edits))

    stages = tuple(tuple(map(tamed, stage)) for stage in request.stages)
    return msgspec.structs.replace(request, stages=stages)


def stream(rng: Random, tokens: int, dtype: torch.dtype) -> Tensor:
    """Residuals of ordinary and of large norm, with a zero token."""
    x = torch.tensor([[rng.gauss(0, 1) for _ in range(WIDTH)] for _ in range(tokens)])
    x *= torch.tensor([[rng.choice((0.0, 1e-6, 1.0, 1.0, 1.0, 30.0, 2000.0))] for _ in range(tokens)])
    return x.to(dtype)


def steps(driver: Driver, ids: Sequence[str]) -> None:
    """Begin a step of TOKENS tokens of each request."""
    driver.write_token_metadata(list(ids), np.zeros(len(ids), np.int64), np.full(len(ids), TOKENS, np.int64))


def finite_with_squares(hidden: Tensor, residual: Tensor) -> bool:
    """Whether the hidden state, the stream, and the square of the stream's norm are finite, in float32 and in dtype."""
    total = hidden.float() + residual.float()
    squares = total.square().sum(1)
    return bool(hidden.isfinite().all() and (hidden + residual).isfinite().all() and squares.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@thorough
@given(seeds)
@example(0)
def test_all_values_behind_a_site_are_finite_and_neighbours_are_untouched(dtype: torch.dtype, seed: int) -> None:
    rng = Random(seed)
    driver, beside_tame = driver_for(dtype), driver_for(dtype)
    neighbour = wire.Request(
        2, TOKENS, False, ((wire.Site(0, (wire.Row(BUNDLE, 0),), (wire.Edit(0, shift=1.0),)),), ())
    )
    for handle, request_id in enumerate(("hostile", "policed"), 1):
        request = program(rng)
        driver.admit(request_id, handle, request)
        beside_tame.admit(request_id, handle, tame(request))
    order = rng.sample(("hostile", "policed", "neighbour", "plain"), 4)
    for target in (driver, beside_tame):
        target.admit("neighbour", 9, neighbour)
        steps(target, order)
    begins = {name: TOKENS * i for i, name in enumerate(order)}
    index = [begins[name] + t for name in ("neighbour", "plain") for t in range(TOKENS)]
    for bank, other in zip(driver.banks, beside_tame.banks, strict=True):
        hidden, residual = (stream(rng, 4 * TOKENS, dtype) for _ in range(2))
        edited = steered(bank, hidden, residual)
        assert finite_with_squares(edited, residual), bank.site
        assert torch.equal(edited[index], steered(other, hidden, residual)[index]), bank.site
        plain = slice(begins["plain"], begins["plain"] + TOKENS)
        assert torch.equal(edited[plain], hidden[plain])
        assert not (bank.edited & bank.rejected).any()
        untouched = ~bank.edited.any(0).any(1)[: len(hidden)]
        assert torch.equal(edited[untouched], hidden[untouched])


@dataclass
class Case:
    """A request of one site that adds `value` along a unit vector."""

    value: float
    restore_norm: bool = False
    max_displacement: float = inf
    relative: bool = False

    def request(self, number: int = 0, stage: int = 0) -> wire.Request:
        """As the first stage or as the policy."""
        unit = np.eye(WIDTH, dtype="<f4")[0].tobytes()
        own = wire.Site(
            number,
            (wire.Row(decoder=unit),),
            (wire.Edit(0, shift=self.value, relative=self.relative),),
            restore_norm=self.restore_norm,
            max_displacement=self.max_displacement,
        )
        stages: tuple[tuple[wire.Site, ...], ...] = ((own,), ()) if stage == 0 else ((), (own,))
        return wire.Request(2, TOKENS, False, stages)


def moved(case: Case, dtype: torch.dtype = torch.float32, stage: int = 0) -> tuple[Tensor, SiteBank]:
    """The displacement [TOKENS, d] of ones at layers.0.resid_post, and its bank."""
    number = LAYOUT.sites.index("layers.0.resid_post")
    driver = driver_for(dtype)
    driver.admit("a", 1, case.request(number, stage))
    steps(driver, ["a"])
    bank = driver.banks[number]
    move: Tensor = bank(torch.ones(TOKENS, WIDTH))
    return move, bank


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_that_overflows_leaves_the_token_as_it_was_and_is_counted(dtype: torch.dtype, stage: int) -> None:
    for case in (Case(9e29), Case(-9e29), Case(9e29, relative=True)):
        move, bank = moved(case, dtype, stage)
        assert not move.any()
        assert not bank.edited.any()
        assert bank.rejected[stage, :TOKENS, 0].all()


def test_the_limit_is_that_of_the_models_dtype() -> None:
    for dtype, value, edited in ((torch.float16, 3e4, False), (torch.bfloat16, 3e4, True), (torch.float32, 3e4, True)):
        _, bank = moved(Case(value), dtype)
        assert bool(bank.edited.any()) == edited
        assert bool(bank.rejected.any()) == (not edited)


@pytest.mark.parametrize("value", [5.0, 9e29, 1e30])
def test_huge_edits_are_capped_and_renormalised_as_small_ones_are(value: float) -> None:
    norm = WIDTH**0.5
    move, bank = moved(Case(value, max_displacement=0.5))
    assert move[0].tolist() == pytest.approx([0.5 * norm] + [0.0] * (WIDTH - 1), abs=1e-6)
    assert bank.edited[0, :TOKENS, 0].all()
    move, _ = moved(Case(value, restore_norm=True))
    assert float((1 + move[0]).norm()) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("bad", [inf, -inf, float("nan"), 3e38])
def test_what_arrives_beyond_range_stays_in_its_token(bad: float) -> None:
    """Of its own token only: the others, with and without a program, are edited as without it."""
    driver = driver_for(torch.float32)
    rng = Random(1)
    for handle, request_id in enumerate(("a", "b"), 1):
        driver.admit(request_id, handle, program(rng))
    steps(driver, ["a", "b", "plain"])
    for bank in driver.banks:
        x = stream(rng, 3 * TOKENS, torch.float32)
        clean: Tensor = bank(x)
        for token in range(len(x)):
            broken = x.clone()
            broken[token] = bad
            move: Tensor = bank(broken)
            others = torch.arange(len(x)) != token
            assert torch.equal(move[others], clean[others])
            assert not move[token].any()


def test_limits_leave_room_for_the_edits_of_all_branches() -> None:
    for dtype in DTYPES:
        limits = {name: value_limit(LAYOUT, name, dtype) for name in LAYOUT.sites}
        branches = sum(limit for name, limit in limits.items() if name.endswith(("attn_out", "mlp_out")))
        assert limits["layers.1.resid_post"] + branches <= torch.finfo(dtype).max / 2
        assert limits["layers.0.mlp_in"] <= MAX_MLP_INPUT
        assert all(limit <= MAX_VALUE and limit**2 < torch.finfo(torch.float32).max / 1e6 for limit in limits.values())


class Gated(nn.Module):
    """A gated MLP, whose products leave float16 long before its input does."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute x * x * x[0]."""
        squares: Tensor = x * x
        return squares - 2 * squares.roll(1, 1)


def test_a_half_precision_mlp_gives_nothing_where_its_products_overflow() -> None:
    number = LAYOUT.sites.index("layers.0.mlp_in")
    driver = driver_for(torch.float16)
    driver.admit("a", 1, Case(9e3).request(number))
    steps(driver, ["a", "plain"])
    bank, mlp = driver.banks[number], Gated()
    hook_mlp_input(nn.ModuleDict({"mlp": mlp}), bank, Reading("Layer", mlp=Branch("mlp"), mlp_input="mlp"))
    x = torch.ones(2 * TOKENS, WIDTH, dtype=torch.float16)
    x[-1] = 1e4
    output = mlp(x)
    assert not output[:TOKENS].any()
    assert torch.equal(output[TOKENS:-1], torch.full_like(output[TOKENS:-1], -1.0))
    assert not output[-1].isfinite().any(), "what the model itself makes of a token is not ours to change"
    assert bank.rejected[0, :TOKENS, 0].all()
    assert not bank.edited.any()


def test_a_sum_of_parts_that_cancel_stays_in_range_in_half_precision() -> None:
    number = LAYOUT.sites.index("layers.0.resid_post")
    driver = driver_for(torch.float16)
    driver.admit("a", 1, Case(1.5e4).request(number))
    steps(driver, ["a"])
    hidden = torch.full((TOKENS, WIDTH), 6e4, dtype=torch.float16)
    assert finite_with_squares(steered(driver.banks[number], hidden, -hidden), -hidden)


def test_the_frame_names_each_rejected_edit_and_token() -> None:
    driver = driver_for(torch.float32)
    ordinary, huge = Case(1.0).request(), Case(9e29).request(1)
    policy = (Case(1.0).request(1).stages[0][0],)
    driver.admit("ordinary", 5, ordinary)
    driver.admit("huge", 6, wire.Request(2, TOKENS, True, ((*ordinary.stages[0], *huge.stages[0]), policy)))
    reader = Reader(driver.banks)

    def frame(*ids: str) -> list[list[int]]:
        steps(driver, ids)
        for bank in driver.banks:
            bank(torch.ones(len(ids) * TOKENS, WIDTH))
        columns: list[list[int]] = (
            np.frombuffer(reader.read(driver.step, ()).frame(0).rejected, "<i8").reshape(-1, len(REJECTED)).tolist()
        )
        return columns

    assert frame("ordinary") == []
    # BOS is not edited. Edit 0 is at another site, edit 2 is the policy's, on the x that was not edited.
    assert frame("ordinary", "huge") == [[6, position, 1] for position in range(1, TOKENS)]
    assert frame("ordinary") == []


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("restore_norm", [False, True])
def test_edit_that_is_capped_at_nothing_moves_nothing_and_is_counted(restore_norm: bool, stage: int) -> None:
    """A policy in shadow mode runs so."""
    for value in (5.0, -1e20):
        move, bank = moved(Case(value, restore_norm=restore_norm, max_displacement=0.0), stage=stage)
        assert not move.any()
        assert bank.edited[stage, :TOKENS, 0].all()
        assert not bank.rejected.any()
