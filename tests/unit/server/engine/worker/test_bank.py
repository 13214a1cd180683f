"""The bank's arithmetic against its definition."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rudder.server.engine.worker.driver import Driver
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import (
    BUNDLE,
    LATENTS,
    WIDTH,
    Floats,
    by_definition,
    grid,
    make_driver,
    random_request,
    random_stage,
    run_step,
    toy_sae,
)

LAYOUT = Layout(
    ("layers.0.resid_post", "layers.1.mlp_out", "layers.1.resid_post"), rows=64, slots=4, stages=2, window=4
)
TOKENS = 6
seeds = st.integers(0, 2**32 - 1)
thorough = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def random_batch(rng: Random) -> tuple[Driver, dict[str, wire.Request], dict[str, Floats]]:
    """Three requests with programs, one that only watches, and one without a payload."""
    driver = make_driver(LAYOUT, toy_sae(rng))
    requests = {name: random_request(rng, LAYOUT, TOKENS) for name in ("a", "b", "c")}
    watching = wire.Site(1, (wire.Row(BUNDLE, 0),), watch=(0,))
    requests["watches"] = wire.Request(2, TOKENS, True, ((watching,),))
    for handle, (name, request) in enumerate(requests.items()):
        driver.admit(name, handle, request)
    xs = {name: grid(rng, len(LAYOUT.sites), TOKENS, WIDTH, top=4) for name in (*requests, "unknown")}
    return driver, requests, xs


def run_whole(rng: Random, driver: Driver, xs: dict[str, Floats]) -> tuple[list[str], dict[str, Floats]]:
    """All requests' tokens in one step, in random batch order."""
    order = rng.sample(sorted(xs), len(xs))
    return order, run_step(driver, [(name, 0, TOKENS) for name in order], xs)


@thorough
@given(seeds)
def test_displacement_equals_the_definition(seed: int) -> None:
    rng = Random(seed)
    driver, requests, xs = random_batch(rng)
    _, moves = run_whole(rng, driver, xs)
    for name, request in requests.items():
        expected = by_definition(request, xs[name], driver.saes[BUNDLE]).moved
        assert moves[name] == pytest.approx(expected, rel=1e-4, abs=1e-4 * (1 + np.abs(expected).max()))


@thorough
@given(seeds)
def test_edited_flags_each_edit_and_blend(seed: int) -> None:
    rng = Random(seed)
    driver, requests, xs = random_batch(rng)
    order, _ = run_whole(rng, driver, xs)
    for name, request in requests.items():
        touched = by_definition(request, xs[name], driver.saes[BUNDLE]).touched
        live, first = driver.requests[name], order.index(name) * TOKENS
        own = {site.site for site in request.stages[0]}
        for stage, sites in enumerate(request.stages):
            # Behind another stage's edits x is off the grid, and whether an edit changes anything can hang on rounding.
            for site in (s for s in sites if stage == 0 or s.site not in own):
                places = live.places(site)
                rows = [e.row for e in site.edits] + ([site.blend.row] if site.blend else [])
                for number, row in enumerate(rows):
                    flags = driver.banks[site.site].edited[stage, first : first + TOKENS, places[row]].tolist()
                    expected = [(stage, site, number, t) in touched for t in range(TOKENS)]
                    assert flags == expected


@thorough
@given(seeds)
def test_tokens_without_a_program_and_padding_have_no_displacement(seed: int) -> None:
    rng = Random(seed)
    driver, requests, xs = random_batch(rng)
    order, moves = run_whole(rng, driver, xs)
    assert not moves["unknown"].any()
    assert not moves["watches"].any()
    for name, request in requests.items():
        assert not request.bos or not moves[name][:, 0].any()
    free = [i for i, name in enumerate(order) for _ in range(TOKENS) if name in ("unknown", "watches")]
    used = len(order) * TOKENS
    for bank in driver.banks:
        flags = bank.edited[:, :used].reshape(LAYOUT.stages, len(order), TOKENS, -1)
        assert not flags[:, sorted(set(free))].any()
        assert not bank.edited[:, used:].any()


@thorough
@given(seeds)
def test_activations_are_those_before_any_edit(seed: int) -> None:
    rng = Random(seed)
    driver, _, xs = random_batch(rng)
    order, _ = run_whole(rng, driver, xs)
    place = driver.requests["watches"].lease.places[1, wire.Row(BUNDLE, 0)]
    for i, name in enumerate(order):
        x = torch.tensor(xs[name][1], dtype=torch.float32)
        expected = driver.saes[BUNDLE].encode(x)[:, 0]
        assert driver.banks[1].activations[i * TOKENS : (i + 1) * TOKENS, place].tolist() == expected.tolist()


@thorough
@given(seeds)
def test_before_and_after_differ_by_the_displacement(seed: int) -> None:
    rng = Random(seed)
    driver, requests, xs = random_batch(rng)
    reader = wire.Request(1, TOKENS, False, requests["a"].stages, watch_prompt=True, capture=True)
    driver.finish("a")
    driver.admit("a", 9, reader)
    _, moves = run_whole(rng, driver, xs)
    rows = driver.step.capture[driver.step.capture > 0]
    assert len(rows) == TOKENS
    for site, bank in enumerate(driver.banks):
        assert bank.before[torch.from_numpy(rows)].tolist() == xs["a"][site].tolist()
        after = bank.after[torch.from_numpy(rows)].double().numpy()
        assert after == pytest.approx(xs["a"][site] + moves["a"][site], rel=1e-5, abs=1e-5)


@thorough
@given(seeds)
def test_no_request_can_cancel_the_policy(seed: int) -> None:
    """The policy's clamp reads x as the request has edited it: its row ends inactive in any case."""
    rng = Random(seed)
    direction = np.eye(WIDTH, dtype="<f4")[rng.randrange(WIDTH)]
    hazard = wire.Row(encoder=direction.tobytes(), decoder=direction.tobytes(), threshold=0.0)
    clamp = wire.Edit(0, scale=0.0, shift=-1.5, above=0.0)
    policy = wire.Site(2, (hazard,), (clamp,))
    driver = make_driver(LAYOUT, toy_sae(rng))
    driver.admit("r", 1, wire.Request(3, TOKENS, False, (random_stage(rng, LAYOUT), (policy,))))
    xs = {"r": grid(rng, len(LAYOUT.sites), TOKENS, WIDTH, top=4)}
    moves = run_step(driver, [("r", 0, TOKENS)], xs)["r"]
    scale = 1 + np.abs(moves).max()
    assert ((xs["r"] + moves)[2] @ direction).max() <= 1e-5 * scale


def test_an_overflowing_row_edits_no_other_request() -> None:
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    huge = wire.Row(encoder=np.full(WIDTH, 3e38, "<f4").tobytes(), decoder=np.ones(WIDTH, "<f4").tobytes())
    stage = (wire.Site(0, (huge,), (wire.Edit(0, shift=1.0),)),)
    driver.admit("huge", 1, wire.Request(1, 3, False, (stage,)))
    small = wire.Row(BUNDLE, 3)
    driver.admit("small", 2, wire.Request(1, 3, False, ((wire.Site(0, (small,), (wire.Edit(0, shift=1.0),)),),)))
    xs = {name: np.full((3, 3, WIDTH), 100.0) for name in ("huge", "small", "none")}
    moves = run_step(driver, [(name, 0, 3) for name in xs], xs)
    assert not moves["none"].any()
    decoder = driver.saes[BUNDLE].decoder[3].double().numpy()
    assert moves["small"][0].tolist() == [decoder.tolist()] * 3


def test_a_small_edit_of_a_large_residual_is_not_lost() -> None:
    """bf16 arithmetic would lose it: its spacing at 25,000 is 128."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    vector = wire.Row(decoder=np.ones(WIDTH, "<f4").tobytes())
    driver.admit("r", 1, wire.Request(1, 1, False, ((wire.Site(0, (vector,), (wire.Edit(0, shift=0.5),)),),)))
    moves = run_step(driver, [("r", 0, 1)], {"r": np.full((3, 1, WIDTH), 25_000.0)})["r"]
    assert moves[0] == pytest.approx(np.full((1, WIDTH), 0.5), abs=2e-3)


def test_the_cap_bounds_the_displacement_and_the_norm_is_restored() -> None:
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    vector = wire.Row(decoder=(np.arange(WIDTH) - 3).astype("<f4").tobytes())
    edits = (wire.Edit(0, shift=5.0),)
    capped, restored = (
        wire.Site(0, (vector,), edits, max_displacement=0.25),
        wire.Site(1, (vector,), edits, restore_norm=True),
    )
    driver.admit("r", 1, wire.Request(1, 4, False, ((capped, restored),)))
    x = grid(Random(1), 3, 4, WIDTH) + 1.25
    moves = run_step(driver, [("r", 0, 4)], {"r": x})["r"]
    norms = np.linalg.norm(x, axis=2)
    assert np.linalg.norm(moves[0], axis=1) == pytest.approx(0.25 * norms[0], rel=1e-5)
    assert np.linalg.norm(x[1] + moves[1], axis=1) == pytest.approx(norms[1], rel=1e-5)
    assert np.linalg.norm(moves[1], axis=1).min() > 0.1


def test_a_row_has_the_parameters_of_its_latent() -> None:
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    rows = tuple(wire.Row(BUNDLE, i) for i in range(LATENTS))
    driver.admit("r", 1, wire.Request(1, 5, False, ((wire.Site(0, rows, watch=tuple(range(LATENTS))),),)))
    x = grid(Random(2), 3, 5, WIDTH, top=4)
    run_step(driver, [("r", 0, 5)], {"r": x})
    places = driver.requests["r"].places(driver.requests["r"].request.stages[0][0])
    expected = driver.saes[BUNDLE].encode(torch.tensor(x[0], dtype=torch.float32))
    assert torch.equal(driver.banks[0].activations[:5, places], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_token_that_is_not_finite_is_read_as_such_and_its_edits_are_rejected(value: float) -> None:
    """A guard that read 0 there would let it pass. The other tokens, and other requests, are as without it."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    ones = np.ones(WIDTH, "<f4").tobytes()
    rows = (wire.Row(decoder=ones), wire.Row(encoder=ones), wire.Row(BUNDLE, 0))
    site = wire.Site(0, rows, (wire.Edit(0, shift=1.0),), watch=(1, 2))
    for handle, name in enumerate(("broken", "other")):
        driver.admit(name, handle, wire.Request(TOKENS, TOKENS, False, ((site,),), watch_prompt=True))
    whole = np.ones((len(LAYOUT.sites), TOKENS, WIDTH))
    broken = whole.copy()
    broken[0, 2, 0] = value
    moves = run_step(driver, [("broken", 0, TOKENS), ("other", 0, TOKENS)], {"broken": broken, "other": whole})
    bank, finite = driver.banks[0], [token for token in range(2 * TOKENS) if token != 2]
    assert not bank.activations[2, 1].isfinite()
    assert bank.activations[finite][:, :3].isfinite().all()
    assert bank.rejected[0, :, 0].nonzero()[:, 0].tolist() == [2]
    assert not moves["broken"][0, 2].any()
    assert all((moves["other"][0] == 1.0).all(1))
