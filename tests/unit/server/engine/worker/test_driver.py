"""Token metadata and entries before a step: each token has its entry, and nothing is left of former requests."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.sae_models.operations import IDENTITY_EDIT, IDENTITY_ENTRY, TOKEN
from rudder.server.engine.ledger import BankFull
from rudder.server.engine.telemetry.frame import Frame
from rudder.server.engine.worker.driver import Driver, token_columns
from rudder.server.engine.worker.reader import Reader
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import BUNDLE, WIDTH, Floats, grid, make_driver, run_step, toy_sae

LAYOUT = Layout(("layers.0.resid_post", "layers.1.resid_post"), rows=8, slots=3, stages=2, capture_tokens=16)
ONES = wire.Row(decoder=np.ones(WIDTH, "<f4").tobytes())


def driver_of(**requests: wire.Request) -> Driver:
    """A driver with these requests admitted, in order."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    for handle, (name, request) in enumerate(requests.items(), 1):
        driver.admit(name, handle, request)
    return driver


def adding(value: float, site: int = 0, prompt_tokens: int = 3, bos: bool = False, **edit: bool) -> wire.Request:
    """A request that adds `value` to every coordinate at one site."""
    stage = (wire.Site(site, (ONES,), (wire.Edit(0, shift=value, **edit),)),)
    return wire.Request(prompt_tokens, 8, bos, (stage,))


def write_metadata(driver: Driver, *chunks: tuple[str, int, int]) -> None:
    """Write the token metadata of a step of (request, start, tokens) in batch order."""
    driver.write_token_metadata([c[0] for c in chunks], *(np.array([c[i] for c in chunks]) for i in (1, 2)))


def amounts(driver: Driver, *chunks: tuple[str, int, int], site: int = 0) -> dict[str, list[float]]:
    """Displacement of each token's first coordinate, on residuals of zeros."""
    xs: dict[str, Floats] = {name: np.zeros((2, 8, WIDTH)) for name, _, _ in chunks}
    return {name: moves[site, :, 0].tolist() for name, moves in run_step(driver, chunks, xs).items()}


@dataclass
class Positions:
    """(handle, start, length) of each request, as a server reads them from frames."""

    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self, frame: Frame) -> None:
        """Take in a frame."""
        if frame.continues:
            assert (frame.handles, frame.starts, frame.lengths) == (b"", b"", b"")
            self.parts = [(handle, start + length, length) for handle, start, length in self.parts]
        else:
            columns = ((frame.handles, "<i8"), (frame.starts, "<i4"), (frame.lengths, "<i4"))
            self.parts = list(zip(*(np.frombuffer(*c).tolist() for c in columns), strict=True))


def test_token_columns_by_hand() -> None:
    reading = wire.Request(2, 8, False, top_k=1)
    driver = driver_of(
        a=adding(1.0, bos=True), b=adding(2.0), reads=reading, all=wire.Request(2, 8, True, capture=True)
    )
    write_metadata(driver, ("b", 2, 3), ("unknown", 0, 1), ("a", 0, 2), ("reads", 1, 3), ("all", 0, 2))
    expected = [
        # entry, slot, start, count, capture
        [4, 2, 0, 3, 0],
        [5, 2, 0, 4, 0],
        [5, 2, 0, 5, 0],
        [1, 0, 3, 1, 0],
        [0, 1, 4, 0, 0],
        [2, 1, 4, 1, 0],
        [0, 0, 6, 2, 0],
        [1, 0, 6, 3, 1],
        [1, 0, 6, 4, 2],
        [0, 0, 9, 0, 3],
        [0, 0, 9, 1, 4],
    ]
    assert token_columns(driver.step).T.tolist() == expected
    assert driver.token[:, :11].T.tolist() == expected


@given(st.integers(0, 2**32 - 1))
def test_metadata_reused_in_decode_steps_equals_metadata_written_anew(seed: int) -> None:
    """With preemption, reordering, requests left out, chunks and drafts, and however long decoding continues."""
    rng = Random(seed)
    requests = {
        "edits": adding(1.0, bos=True, generated=rng.random() < 0.5),
        "reads": wire.Request(2, 9, bool(rng.randint(0, 1)), ((), ()), top_k=1),
        "captures": wire.Request(rng.randint(1, 4), 9, True, ((), ()), capture=True),
    }
    driver = make_driver(replace(LAYOUT, capture_tokens=64), toy_sae(Random(0)))
    for handle, (name, request) in enumerate(requests.items(), 1):
        driver.admit(name, handle, request)
    reader, positions = Reader(driver.banks), Positions()
    at = dict.fromkeys(requests, 0)
    order = list(requests)
    for _ in range(rng.randint(1, 30)):
        if rng.random() < 0.2:
            rng.shuffle(order)
        if rng.random() < 0.1:
            name = rng.choice(order)
            at[name] = rng.choice([0, max(at[name] - 1, 0)])
        running = order if rng.random() < 0.8 else order[:2]
        left = {name: requests[name].prompt_tokens - at[name] for name in running}
        lengths = {name: rng.randint(1, max(left[name], 1 + (rng.random() < 0.1))) for name in running}
        write_metadata(driver, *((name, at[name], lengths[name]) for name in running))
        assert driver.token[:, : driver.step.tokens].tolist() == token_columns(driver.step).tolist()
        # What the last step wrote behind this one's tokens is the identity again.
        assert not driver.token[[TOKEN.index("entry"), TOKEN.index("slot")], driver.step.tokens :].any()
        # A step without a frame, as before the telemetry is connected, is not taken for one that had a frame.
        if rng.random() < 0.9:
            positions.take(reader.read(driver.step, ()).frame(0))
            assert positions.parts == [(1 + list(requests).index(name), at[name], lengths[name]) for name in running]
        for name in running:
            at[name] += lengths[name]


def test_entries_follow_the_runners_batch_order() -> None:
    driver = driver_of(a=adding(1.0), b=adding(2.0))
    assert amounts(driver, ("a", 0, 2), ("b", 0, 1)) == {"a": [1, 1], "b": [2]}
    assert amounts(driver, ("b", 1, 1), ("a", 2, 2)) == {"a": [1, 1], "b": [2]}


@pytest.mark.parametrize("chunks", [[(0, 8)], [(0, 2), (2, 4), (6, 2)], [(i, 1) for i in range(8)], [(0, 6), (0, 8)]])
def test_phases_go_by_position(chunks: list[tuple[int, int]]) -> None:
    """Chunks may cross the boundary, and what is computed again after a preemption keeps its phase."""
    driver = driver_of(p=adding(1.0, generated=False), g=adding(2.0, prompt=False))
    for start, length in chunks:
        moved = amounts(driver, ("p", start, length), ("g", start, length))
        positions = range(start, start + length)
        assert moved["p"] == [1.0 if t < 3 else 0.0 for t in positions]
        assert moved["g"] == [0.0 if t < 3 else 2.0 for t in positions]


def test_position_0_is_exempt_from_edits_only_if_it_holds_bos() -> None:
    driver = driver_of(with_bos=adding(1.0, bos=True), without=adding(1.0))
    moved = amounts(driver, ("with_bos", 0, 2), ("without", 0, 2))
    assert moved == {"with_bos": [0, 1], "without": [1, 1]}
    assert amounts(driver, ("with_bos", 2, 1))["with_bos"] == [1]


def test_padding_has_the_identity_entry_after_a_longer_step() -> None:
    driver = driver_of(a=adding(1.0), b=adding(2.0))
    write_metadata(driver, ("a", 0, 5), ("b", 0, 6))
    write_metadata(driver, ("a", 5, 1))
    assert driver.token[TOKEN.index("entry")].tolist() == [3] + [0] * 47
    assert driver.token[TOKEN.index("start"), :11].tolist() == list(range(11))
    moves = [bank(torch.ones(11, WIDTH)) for bank in driver.banks]
    assert all(not move[1:].any() for move in moves)


def test_released_slots_and_rows_leave_the_identity() -> None:
    both = (
        wire.Site(0, (ONES,), (wire.Edit(0, shift=5.0),), wire.Blend(0, 0.5), restore_norm=True, max_displacement=0.1),
    )
    gate = wire.Gate(((0, 0.5),), wire.Sequence(0, level_rate=0.5))
    policy = (wire.Site(1, (wire.Row(BUNDLE, 1),), (wire.Edit(0, scale=0.0),), gate=gate),)
    driver = driver_of(old=wire.Request(3, 8, True, (both, policy)))
    run_step(driver, [("old", 0, 4)], {"old": grid(Random(0), 2, 4, WIDTH)})
    driver.finish("old")
    for bank in driver.banks:
        assert torch.equal(bank.edits, torch.tensor(IDENTITY_EDIT)[:, None].expand(bank.edits.shape))
        assert torch.equal(bank.entries, torch.tensor(IDENTITY_ENTRY, dtype=torch.float64).expand(bank.entries.shape))
    driver.admit("new", 2, adding(1.0, site=1))
    assert driver.requests["new"].lease.slot == 1
    assert amounts(driver, ("new", 0, 5), site=0)["new"] == [0] * 5
    assert amounts(driver, ("new", 0, 5), site=1)["new"] == [1] * 5


def test_a_reused_row_place_is_loaded_anew() -> None:
    driver = driver_of(
        old=wire.Request(3, 8, False, ((wire.Site(0, (wire.Row(BUNDLE, 1),), (wire.Edit(0, shift=1.0),)),),))
    )
    driver.finish("old")
    driver.admit("new", 2, adding(2.0))
    bank = driver.banks[0]
    assert driver.requests["new"].places(driver.requests["new"].request.stages[0][0]) == [0]
    assert not bank.encoder[0].any()
    assert (float(bank.bias[0]), float(bank.threshold[0])) == (0.0, -np.inf)
    assert bank.decoder[0].tolist() == [1.0] * WIDTH


def test_shared_rows_stay_until_their_last_request_finishes() -> None:
    driver = driver_of(a=adding(1.0), b=adding(2.0))
    driver.finish("a")
    driver.finish("a")
    assert amounts(driver, ("b", 0, 2))["b"] == [2, 2]
    assert driver.ledger.rows_used(0) == 1


def test_a_request_admitted_twice_keeps_its_lease() -> None:
    driver = driver_of(a=adding(1.0))
    driver.admit("a", 1, adding(1.0))
    assert (driver.ledger.slots_used, driver.ledger.rows_used(0)) == (1, 1)
    driver.finish("a")
    assert (driver.ledger.slots_used, driver.ledger.rows_used(0)) == (0, 0)


def test_a_request_that_does_not_fit_is_an_error_and_is_not_admitted() -> None:
    driver = driver_of(a=adding(1.0), b=adding(2.0), c=adding(3.0))
    with pytest.raises(BankFull):
        driver.admit("d", 4, adding(4.0))
    assert amounts(driver, ("d", 0, 2))["d"] == [0, 0]


def test_a_step_allocates_no_new_buffers() -> None:
    """A captured graph replays on the addresses it saw."""
    driver = driver_of(a=adding(1.0))
    names = [*driver.banks[0].named_buffers(), *driver.banks[1].named_buffers()]
    before = [(name, buffer.data_ptr()) for name, buffer in names]
    amounts(driver, ("a", 0, 4))
    driver.finish("a")
    driver.admit("b", 2, adding(2.0))
    amounts(driver, ("b", 0, 4))
    after = [*driver.banks[0].named_buffers(), *driver.banks[1].named_buffers()]
    assert [(name, buffer.data_ptr()) for name, buffer in after] == before


def test_the_frame_counts_tokens_edited_by_each_edit() -> None:
    latent, threshold_row = wire.Row(BUNDLE, 2), wire.Row(BUNDLE, 3)
    edits = (wire.Edit(0, shift=1.0, generated=False), wire.Edit(1, shift=1.0, prompt=False))
    own = wire.Site(0, (ONES, second_copy(ONES), latent), edits, wire.Blend(1, 0.5), watch=(2,))
    policy = wire.Site(1, (threshold_row,), (wire.Edit(0, shift=0.5),))
    driver = driver_of(a=wire.Request(3, 8, True, ((own,), (policy,))), b=adding(2.0))
    x = {name: grid(Random(3), 2, 8, WIDTH, top=4) for name in ("a", "b")}
    run_step(driver, [("b", 0, 2), ("a", 0, 5)], x)
    frame = Reader(driver.banks).read(driver.step, [4]).frame(7)
    assert np.frombuffer(frame.handles, "<i8").tolist() == [2, 1]
    assert np.frombuffer(frame.starts, "<i4").tolist() == [0, 0]
    assert np.frombuffer(frame.lengths, "<i4").tolist() == [2, 5]
    assert np.frombuffer(frame.released, "<i8").tolist() == [4]
    # b's edit; a's prompt tokens behind BOS, a's generated tokens, which its blend shares, and the policy's.
    flags = np.frombuffer(frame.flags, "u1")
    assert flags[:2].tolist() == [1, 1]
    assert flags[2:].reshape(5, 4).sum(0).tolist() == [2, 4, 4, 4]
    # By token: edit of prompt tokens, edit of generated ones and the blend on its row, policy.
    assert flags[2:].reshape(5, 4).tolist() == [[0] * 4, [1] * 4, [1] * 4, [0, 1, 1, 1], [0, 1, 1, 1]]
    active = driver.saes[BUNDLE].encode(torch.tensor(x["a"][0, 3:5], dtype=torch.float32))[:, 2]
    assert np.frombuffer(frame.activations, "<f4").tolist() == active.tolist()


GATE_ROW = wire.Row(encoder=np.eye(1, WIDTH, dtype="<f4").tobytes())
STATISTICS: dict[str, tuple[wire.Sequence, Callable[[Floats], float]]] = {
    "share": (wire.Sequence(0, binary=0.5, level_rate=0.5), lambda u: float((u > 0.5).sum())),
    "moving average": (
        wire.Sequence(0, decay=0.5, gain=0.5),
        lambda u: sum(0.5 ** (len(u) - i) * x for i, x in enumerate(u)),
    ),
    "window": (wire.Sequence(0, window=3), lambda u: float(np.mean(u[-3:]))),
    "cusum": (wire.Sequence(0, offset=-0.5, floor=0.0), lambda u: reduce(lambda s, x: max(0.0, s + x - 0.5), u, 0.0)),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("chunks", [[8], [1, 2, 5], [3, 1, 1, 1, 1, 1]])
def test_the_frame_counts_open_gates_and_has_their_statistics(name: str, chunks: list[int]) -> None:
    """A policy with a gate on tokens, a program with one on the sequence; BOS is evaluated by neither."""
    sequence, statistic = STATISTICS[name]
    edits = (wire.Edit(1, shift=1.0),)
    program = wire.Site(0, (GATE_ROW, ONES), edits, gate=wire.Gate((), sequence))
    policy = wire.Site(1, (GATE_ROW, ONES), edits, gate=wire.Gate(((0, 1.2),)))
    driver = driver_of(
        other=adding(2.0), a=wire.Request(3, 8, True, ((program,), (policy,))), free=wire.Request(1, 9, False, ((),))
    )
    x = {name: grid(Random(4), 2, 8, WIDTH, top=4) for name in ("other", "a", "free")}
    scores = x["a"][0, :, 0]
    start, opened, touched = 0, [], []
    reader = Reader(driver.banks)
    for length in chunks:
        run_step(driver, [("other", start, length), ("a", start, length), ("free", start, length)], x)
        frame = reader.read(driver.step, []).frame(start)
        flags = np.frombuffer(frame.flags, "u1")[length:].reshape(length, 4)
        opened += flags[:, 2:].tolist()
        touched += flags[:, :2].tolist()
        start += length
        # Of 64 bits, without the score of BOS.
        expected = statistic(scores[1:start]) if start > 1 else 0.0
        assert np.frombuffer(frame.statistics, "<f8").tolist() == pytest.approx([expected])
    assert opened[0] == touched[0] == [0, 0]
    # An unconditional edit touches the tokens at which its gate is open.
    assert opened == touched
    assert [policy for _, policy in opened[1:]] == (x["a"][1, 1:, 0] > 1.2).astype(int).tolist()


def second_copy(row: wire.Row) -> wire.Row:
    """An equal row with a place of its own."""
    return wire.Row(row.bundle, row.latent, row.encoder, row.decoder, row.bias, row.threshold, copy=1)
