"""Sequence state does not depend on chunks, preemption, rejected drafts, batch order or other requests."""

from random import Random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rudder.sae_models.edit import scan, sequence_condition
from rudder.sae_models.operations import ENTRY, IDENTITY_ENTRY, TOKEN
from rudder.server.engine.worker.bank import condition_within_length
from rudder.server.engine.worker.driver import Driver
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import (
    BUNDLE,
    WIDTH,
    Floats,
    by_definition,
    grid,
    make_driver,
    random_request,
    run_step,
    toy_sae,
)

LAYOUT = Layout(("layers.0.resid_post", "layers.1.resid_post"), rows=48, slots=3, stages=2, window=4)
LONGEST = 14
thorough = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


class Schedule:
    """An engine that schedules as irregularly as vLLM may; `moved`: displacement of each token when it was accepted."""

    def __init__(self, rng: Random, driver: Driver, requests: dict[str, wire.Request], xs: dict[str, Floats]) -> None:
        self.rng, self.driver, self.requests, self.xs = rng, driver, requests, xs
        self.waiting = list(requests)
        self.position: dict[str, int] = {}
        self.moved = {name: np.full_like(x, np.nan) for name, x in xs.items()}
        self.was_open: dict[tuple[str, int, int], bool] = {}

    def run(self) -> None:
        """Step until every request has finished."""
        while self.waiting or self.position:
            self.step()

    def step(self) -> None:
        """Admit, preempt, order the batch, run, reject drafts, finish."""
        rng = self.rng
        while self.waiting and len(self.position) < LAYOUT.slots:
            name = self.waiting.pop(0)
            self.driver.admit(name, len(self.waiting), self.requests[name])
            self.position[name] = 0
        for name in self.position:
            if rng.random() < 0.05:
                self.position[name] = 0
        running = rng.sample(sorted(self.position), rng.randint(1, len(self.position)))
        chunks = [(n, p, min(rng.randint(1, 5), LONGEST - p)) for n in running for p in [self.position[n]]]
        accepted = {n: rng.randint(1, length) if rng.random() < 0.3 else length for n, _, length in chunks}
        moves = run_step(self.driver, chunks, self.with_drafts(chunks, accepted))
        offset = 0
        for name, start, length in chunks:
            self.count(name, start, accepted[name], moves[name], offset)
            offset += length

    def with_drafts(self, chunks: list[tuple[str, int, int]], accepted: dict[str, int]) -> dict[str, Floats]:
        """Replace the residuals of drafts that will be rejected by others."""
        xs = {name: self.xs[name].copy() for name, _, _ in chunks}
        for name, start, length in chunks:
            draft = slice(start + accepted[name], start + length)
            xs[name][:, draft] = grid(self.rng, *xs[name][:, draft].shape, top=4)
        return xs

    def count(self, name: str, start: int, accepted: int, moves: Floats, offset: int) -> None:
        """Record the accepted tokens; finish the request after its last."""
        self.moved[name][:, start : start + accepted] = moves[:, :accepted]
        for stage in range(LAYOUT.stages):
            for i in range(accepted):
                self.was_open[name, stage, start + i] = bool(self.driver.sequences.is_open[stage, offset + i])
        self.position[name] = start + accepted
        if self.position[name] == LONGEST:
            del self.position[name]
            self.driver.finish(name)


@thorough
@given(st.integers(0, 2**32 - 1))
def test_state_equals_a_loop_over_tokens(seed: int) -> None:
    rng = Random(seed)
    driver = make_driver(LAYOUT, toy_sae(rng))
    requests = {f"r{i}": random_request(rng, LAYOUT, LONGEST, ("s", "ts")) for i in range(5)}
    xs = {name: grid(rng, len(LAYOUT.sites), LONGEST, WIDTH, top=4) for name in requests}
    for name, request in requests.items():
        # Whatever is read there: its score, of which state must not become NaN, may be that of another request's row.
        xs[name][:, list(request.excluded)] = rng.choice((1e3, np.inf))
    schedule = Schedule(rng, driver, requests, xs)
    schedule.run()
    for name, request in requests.items():
        trace = by_definition(request, xs[name], driver.saes[BUNDLE])
        for (stage, t), is_open in trace.is_open.items():
            assert schedule.was_open[name, stage, t] == is_open
        assert schedule.moved[name] == pytest.approx(trace.moved, rel=1e-4, abs=1e-4 * (1 + np.abs(trace.moved).max()))
    assert driver.ledger.slots_used == 0
    assert not driver.requests


def one_gate(sequence: wire.Sequence) -> tuple[Driver, wire.Request]:
    """A driver, and a request whose gate scores the first coordinate; two prompt tokens, BOS first."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    first = np.eye(WIDTH, dtype="<f4")[0].tobytes()
    rows = (wire.Row(encoder=first), wire.Row(decoder=first))
    site = wire.Site(0, rows, (wire.Edit(1, shift=1.0),), gate=wire.Gate(sequence=sequence))
    return driver, wire.Request(2, LONGEST, True, ((site,),))


def opened(driver: Driver, scores: list[float], chunks: list[tuple[int, int]], name: str = "r") -> list[bool]:
    """Whether the gate was open at each of the chunks' tokens, for these scores."""
    x = np.zeros((2, len(scores), WIDTH))
    x[0, :, 0] = scores
    return [bool(v) for start, n in chunks for v in run_step(driver, [(name, start, n)], {name: x})[name][0, :, 0]]


STATISTICS = {
    "share": (wire.Sequence(0, binary=0.5, level_rate=0.5), [False, True, False, True, True, True]),
    "moving_average": (wire.Sequence(0, decay=0.5, gain=0.5, level=0.6), [False, False, False, True, True, False]),
    "window": (wire.Sequence(0, window=2, level=0.75), [False, True, False, False, True, False]),
    "cusum": (wire.Sequence(0, offset=-0.5, floor=0.0, level=0.75), [False, False, False, False, True, False]),
    "latched": (wire.Sequence(0, window=2, level=0.75, latch=True), [False, True, True, True, True, True]),
    "min_tokens": (
        wire.Sequence(0, binary=0.5, level_rate=0.5, min_tokens=4),
        [False, False, False, False, True, True],
    ),
}
# BOS scores highest of all and must not be counted.
SCORES = [9.0, 1.0, 0.0, 1.0, 1.0, 0.0]
CHUNKINGS = [[(0, 6)], [(i, 1) for i in range(6)], [(0, 1), (1, 5)], [(0, 2), (2, 3), (5, 1)]]


@pytest.mark.parametrize("chunks", CHUNKINGS)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_by_hand(name: str, chunks: list[tuple[int, int]]) -> None:
    sequence, expected = STATISTICS[name]
    driver, request = one_gate(sequence)
    driver.admit("r", 1, request)
    # Another request has written the shared buffers before.
    driver.admit("other", 2, request)
    opened(driver, [9.0] * 12, [(0, 6)], "other")
    assert opened(driver, SCORES, chunks) == expected


EXCLUDED = (2, 4, 5, 9)
# Where the tokens of SCORES stand if these positions are excluded.
COUNTED = [0, 1, 3, 6, 7, 8]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(STATISTICS)))
def test_excluded_tokens_take_no_part_in_a_statistic(seed: int, name: str) -> None:
    """Neither in a window nor in a count, however the tokens are cut into steps and whenever they run again."""
    rng, (sequence, expected) = Random(seed), STATISTICS[name]
    driver, request = one_gate(sequence)
    driver.admit("other", 1, request)
    driver.admit("r", 2, msgspec.structs.replace(request, excluded=EXCLUDED))
    scores = [9.0] * 10
    for position, score in zip(COUNTED, SCORES, strict=True):
        scores[position] = score
    start, chunks = 0, []
    while start < len(scores):
        chunks.append((start, min(rng.randint(1, 4), len(scores) - start)))
        start += chunks[-1][1]
    restart = rng.randrange(len(chunks))
    opened(driver, scores, chunks[:restart])
    opened(driver, [9.0] * 12, [(0, 6)], "other")
    result = opened(driver, scores, chunks)
    assert [result[position] for position in COUNTED] == expected
    assert not any(result[position] for position in EXCLUDED)


def test_the_next_request_in_a_slot_starts_from_zero_state() -> None:
    driver, request = one_gate(wire.Sequence(0, decay=1.0, gain=1.0, level=3.0, latch=True))
    driver.admit("first", 1, request)
    assert opened(driver, [5.0] * 6, [(0, 3), (3, 3)], "first")[-1]
    driver.finish("first")
    driver.admit("second", 2, request)
    assert not any(opened(driver, [0.5] * 6, [(0, 3), (3, 3)], "second"))


def test_a_preempted_request_counts_its_tokens_once() -> None:
    driver, request = one_gate(wire.Sequence(0, decay=1.0, gain=1.0, level=3.5))
    driver.admit("r", 1, request)
    scores = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    opened(driver, scores, [(0, 4)])
    assert opened(driver, scores, [(0, 3), (3, 3)]) == [False, False, False, False, True, True]


def test_a_request_left_out_of_a_step_after_a_rejected_draft() -> None:
    driver, request = one_gate(wire.Sequence(0, decay=1.0, gain=1.0, level=3.5))
    driver.admit("r", 1, request)
    driver.admit("other", 2, request)
    assert not any(opened(driver, [0.0, 1.0, 1.0, -9.0, -9.0], [(0, 5)]))
    opened(driver, [9.0] * 5, [(0, 5)], "other")
    assert opened(driver, [0.0, 1.0, 1.0, 1.0, 1.0], [(3, 2)]) == [False, True]


def test_a_gap_in_a_sequence_is_an_error() -> None:
    driver, request = one_gate(wire.Sequence(0, decay=1.0, gain=1.0, level=3.5))
    driver.admit("r", 1, request)
    opened(driver, [0.0] * 6, [(0, 2)])
    with pytest.raises(RuntimeError, match="does not reach"):
        opened(driver, [0.0] * 6, [(4, 2)])


def test_the_scan_equals_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    decay, shift, floor = (
        torch.rand(17, generator=generator, dtype=torch.float64) - shift for shift in (0.0, 0.5, 0.7)
    )
    start = torch.tensor([0] * 5 + [5] * 1 + [6] * 11)
    a, b, c = scan(decay, shift, floor, start, steps=5)
    for t in range(17):
        state = 0.25
        for i in range(int(start[t]), t + 1):
            state = max(float(floor[i]), float(decay[i]) * state + float(shift[i]))
        assert float(torch.maximum(c[t], a[t] * 0.25 + b[t])) == pytest.approx(state, abs=1e-12)


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 4], [9], [2, 7], [8, 1]])
def test_the_length_bounded_scan_of_a_cpu_equals_the_whole_scan(lengths: list[int]) -> None:
    g = torch.Generator().manual_seed(len(lengths))
    table = dict(zip(ENTRY, IDENTITY_ENTRY, strict=True))
    table |= {"gated": 1.0, "sequence": 1.0, "decay": 0.9, "gain": 1.0, "level": 0.1, "floor": -1.0, "latch": 1.0}
    entry = torch.tensor([table[name] for name in ENTRY], dtype=torch.float64).repeat(9, 1)
    start = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    slot = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    columns = {"slot": slot, "start": start, "count": torch.arange(9) + 1}
    token = torch.stack([columns.get(name, torch.zeros_like(start)) for name in TOKEN])
    state = torch.rand(9, generator=g).double(), torch.zeros(9, dtype=torch.long), torch.zeros(9, 4).double()
    f = torch.randn(9, 3, generator=g)
    whole = sequence_condition(f, entry, token, *state, steps=12)
    bounded = condition_within_length(f, entry, token, *state, torch.tensor(max(lengths)))
    for ours, expected in zip(bounded, whole, strict=True):
        assert torch.equal(ours, expected)
    assert whole[0].any()


def test_without_a_sequence_condition_nothing_holds() -> None:
    entry = torch.tensor(IDENTITY_ENTRY, dtype=torch.float64).repeat(2, 1)
    state = torch.zeros(1).double(), torch.zeros(1, dtype=torch.long), torch.zeros(1, 4).double()
    token = torch.zeros(len(TOKEN), 2, dtype=torch.long)
    assert not condition_within_length(torch.ones(2, 3), entry, token, *state, torch.tensor(0))[0].any()


def test_max_length_is_that_of_requests_with_a_sequence_condition() -> None:
    driver, request = one_gate(wire.Sequence(0, decay=1.0, gain=1.0, level=3.5))
    driver.admit("r", 1, request)
    driver.admit("other", 2, wire.Request(1, 100, False, ((),)))
    max_lengths = []
    for ids, starts, lengths in (
        (["r", "other"], (0, 0), (5, 9)),
        (["other", "r"], (9, 5), (1, 2)),
        (["other"], (10,), (1,)),
    ):
        driver.write_token_metadata(ids, np.array(starts), np.array(lengths))
        max_lengths.append(int(driver.sequences.max_length))
    assert max_lengths == [5, 2, 0]


def test_a_closed_gate_does_not_affect_the_next_request_at_its_batch_index() -> None:
    driver, request = one_gate(wire.Sequence(0, decay=1.0, gain=1.0, level=3.5))
    driver.admit("gated", 1, request)
    ungated = msgspec.structs.replace(request, stages=((msgspec.structs.replace(request.stages[0][0], gate=None),),))
    driver.admit("ungated", 2, ungated)
    assert not any(opened(driver, [0.0] * 4, [(0, 4)], "gated"))
    assert opened(driver, [0.0] * 4, [(0, 4)], "ungated") == [False, True, True, True]
