"""Tokens at excluded positions are neither edited nor counted nor read, whichever steps they run in."""

from random import Random
from sys import maxsize
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models.operations import TOKEN
from rudder.sae_models.sparse.screening import prepare_screening
from rudder.server.engine.telemetry.frame import PINNED, Frame
from rudder.server.engine.telemetry.hub import Hub
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.reader import Readable, Reader
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import BUNDLE, WIDTH, Floats, grid, make_driver, random_positions, run_step, toy_sae

LAYOUT = Layout(("layers.0.resid_post", "layers.1.resid_post"), rows=16, slots=3, stages=2, capture_tokens=48)
ONES = wire.Row(decoder=np.ones(WIDTH, "<f4").tobytes())
FIRST = wire.Row(encoder=np.eye(1, WIDTH, dtype="<f4").tobytes())
LATENT = wire.Row(BUNDLE, 2)
ALWAYS = wire.Row(encoder=np.zeros(WIDTH, "<f4").tobytes(), bias=1.0)
EDIT = (wire.Edit(1, shift=1.0),)
PROMPT, TOKENS, K = 9, 14, 3
ENTRY, COUNT = TOKEN.index("entry"), TOKEN.index("count")


def request_of(excluded: tuple[int, ...], bos: bool = True, **fields: Any) -> wire.Request:
    """A program with a gate that is open at every token, a policy without one, watched rows and top-k latents."""
    gate = wire.Gate(sequence=wire.Sequence(0, binary=0.5, level=0.5))
    program = wire.Site(0, (ALWAYS, ONES, LATENT), EDIT, gate=gate, watch=(0, 2))
    policy = wire.Site(1, (FIRST, ONES), EDIT)
    defaults: dict[str, Any] = {"watch_prompt": True, "top_k": K, "top_k_sites": (0,), "capture": True}
    return wire.Request(PROMPT, TOKENS, bos, ((program,), (policy,)), excluded=excluded, **(defaults | fields))


def reader_of(driver: Driver) -> Reader:
    """A reader with the whole dictionary at the first site."""
    reader = Reader(driver.banks)
    reader.dictionaries[0] = Readable(prepare_screening(driver.saes[BUNDLE]), [0])
    return reader


def random_chunks(rng: Random) -> list[tuple[int, int]]:
    """Cut the tokens into steps: the prompt in chunks, then one token a step."""
    chunks, start = [], 0
    while start < TOKENS:
        length = rng.randint(1, PROMPT - start) if start < PROMPT else 1
        chunks.append((start, length))
        start += length
    return chunks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_reports_leave_out_excluded_tokens(seed: int) -> None:
    """Over chunks, preemptions and another request; position 0 is reported unless it is excluded itself."""
    rng = Random(seed)
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    reader, hub = reader_of(driver), Hub(lambda _: None, lambda _: None)
    excluded, bos = random_positions(rng, TOKENS), rng.random() < 0.5
    request, other = request_of(excluded, bos), request_of((), False)
    xs = {name: grid(rng, 2, TOKENS, WIDTH, top=4) for name in ("r", "other")}
    for handle, (name, admitted) in enumerate((("r", request), ("other", other)), 1):
        driver.admit(name, handle, admitted)
        hub.open(handle, admitted)
    inbox, other_inbox = hub.inboxes[1], hub.inboxes[2]
    chunks = random_chunks(rng)
    run: dict[str, Floats] = {}
    for number, (start, length) in enumerate(([(0, rng.randint(1, PROMPT))] if rng.random() < 0.5 else []) + chunks):
        order = rng.choice((("r", "other"), ("other", "r")))
        moved = run_step(driver, [(name, start, length) for name in order], xs)
        hub.take(reader.read(driver.step, ()).frame(number))
        assert inbox.statistics_at(start + length) == (request.counted_before(start + length),)
        for name, move in moved.items():
            run.setdefault(name, np.zeros((2, TOKENS, WIDTH)))[:, start : start + length] = move
    uncounted = set(request.uncounted)
    counted = [position not in uncounted for position in range(TOKENS)]
    assert (run["r"] == np.array(counted)[None, :, None]).all(), "both stages add 1, at counted tokens only"
    assert (run["other"] == 1).all()
    number = sum(counted)
    assert inbox.flagged_before(TOKENS) == ((number, number), (number,))
    assert inbox.statistics_at(TOKENS) == (number,)
    assert other_inbox.flagged_before(TOKENS) == ((TOKENS, TOKENS), (TOKENS,))
    features = inbox.take(maxsize)
    assert (features.first, features.end) == (0, TOKENS)
    read = [position not in excluded for position in range(TOKENS)]
    encoded = driver.saes[BUNDLE].encode(torch.tensor(xs["r"][0], dtype=torch.float32)).numpy()
    assert features.activations[:, 0].tolist() == read
    assert features.activations[:, 1].tolist() == np.where(read, encoded[:, 2], 0).tolist()
    strongest = -np.sort(-encoded, 1)[:, :K]
    assert features.top_values[:, 0] == pytest.approx(np.where(np.array(read)[:, None], strongest, 0))
    captured = b"".join(capture.before for capture in inbox.captures if capture.site == 0)
    assert captured == xs["r"][0].astype("<f4").tobytes(), "captures have the residuals of all tokens"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_metadata_of_excluded_tokens_equals_the_definition(seed: int) -> None:
    """Over chunks, preemptions, drafts and decode steps; prompt and generated tokens are excluded."""
    rng = Random(seed)
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    requests = {
        name: request_of(random_positions(rng, TOKENS), rng.random() < 0.5, capture=False) for name in ("a", "b", "c")
    }
    for handle, (name, request) in enumerate(requests.items(), 1):
        driver.admit(name, handle, request)
    at = dict.fromkeys(requests, 0)
    order = list(requests)
    while order:
        if rng.random() < 0.2:
            rng.shuffle(order)
        if rng.random() < 0.1:
            at[rng.choice(order)] = 0
        parts = []
        for name in order:
            room = PROMPT - at[name] if at[name] < PROMPT else min(TOKENS - at[name], 1 + (rng.random() < 0.1))
            parts.append((name, at[name], rng.randint(1, room)))
        ids, starts, lengths = zip(*parts, strict=True)
        driver.write_token_metadata(ids, np.array(starts), np.array(lengths))
        expected = []
        for name, start, length in parts:
            uncounted, slot = requests[name].uncounted, driver.requests[name].lease.slot
            for position in range(start, start + length):
                entry = 0 if position in uncounted else 2 * slot + (position >= PROMPT)
                expected.append((entry, position + 1 - sum(u <= position for u in uncounted)))
            at[name] += length
        assert [tuple(column) for column in driver.token[[ENTRY, COUNT], : len(expected)].T.tolist()] == expected
        order = [name for name in order if at[name] < TOKENS]


def test_steady_decoding_rewrites_metadata_only_around_excluded_positions() -> None:
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    driver.admit("r", 1, request_of((0, 3, 12)))
    driver.admit("other", 2, request_of(()))
    driver.write_token_metadata(["r", "other"], np.array([0, 0]), np.array([PROMPT, PROMPT]))
    steps = []
    for position in range(PROMPT, TOKENS + 4):
        driver.write_token_metadata(["r", "other"], np.array([position, position]), np.array([1, 1]))
        steps.append(driver.step)
    changes = [PROMPT + n for n in range(1, len(steps)) if steps[n] is not steps[n - 1]]
    assert changes == [12, 13]


def totals_of(frame: Frame) -> dict[str, list[float]]:
    """The totals of the pinned rows, by name."""
    columns = np.frombuffer(frame.pinned, "<f8").reshape(-1, len(PINNED)).T
    return dict(zip(PINNED, columns.tolist(), strict=True))


@pytest.mark.parametrize("chunks", [[(0, 9)], [(0, 3), (3, 3), (6, 3)], [(i, 1) for i in range(9)]])
def test_totals_of_pinned_rows_leave_out_excluded_tokens(chunks: list[tuple[int, int]]) -> None:
    """Also of a call that has no program and watches nothing."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    pinned = wire.Site(0, (ALWAYS, LATENT), watch=(0, 1))
    driver.admit("pinned", 0, wire.Request(0, 0, False, ((pinned,),)))
    reader = Reader(driver.banks)
    reader.pin({0: driver.requests["pinned"].places(pinned)})
    driver.admit("r", 1, wire.Request(PROMPT, TOKENS, True, ((),), excluded=(2, 3, 7)))
    x = grid(Random(5), 2, TOKENS, WIDTH, top=4)
    x[:, [2, 3, 7]] = 1e4
    totals = []
    for number, (start, length) in enumerate(chunks):
        run_step(driver, [("r", start, length)], {"r": x})
        totals.append(totals_of(reader.read(driver.step, ()).frame(number)))
    f = driver.saes[BUNDLE].encode(torch.tensor(x[0, [1, 4, 5, 6, 8]], dtype=torch.float32))[:, 2]
    sums = {name: np.sum([total[name] for total in totals], 0).tolist() for name in ("active_tokens", "tokens", "sum")}
    assert sums == {
        "active_tokens": [5, int((f > 0).sum())],
        "tokens": [5, 5],
        "sum": [5, pytest.approx(float(f.sum()))],
    }
    assert np.max([total["maximum"] for total in totals], 0).tolist() == [1, pytest.approx(float(f.max()))]


def test_chunks_of_equal_length_do_not_share_the_gap_of_bos() -> None:
    """No gate is evaluated at BOS, in the first chunk only."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    request = request_of((), capture=False, top_k=0, top_k_sites=())
    driver.admit("r", 1, request)
    reader, hub = Reader(driver.banks), Hub(lambda _: None, lambda _: None)
    inbox = hub.open(1, request)
    for number, start in enumerate((0, 3, 6)):
        run_step(driver, [("r", start, 3)], {"r": np.zeros((2, TOKENS, WIDTH))})
        hub.take(reader.read(driver.step, ()).frame(number))
    assert inbox.flagged_before(9) == ((8, 8), (8,))


def test_a_row_of_another_request_that_overflows_at_bos_does_not_reach_a_gate() -> None:
    """BOS has entry 0, whose score is read at row place 0: of whoever holds that."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    huge = wire.Row(encoder=np.full(WIDTH, 3e38, "<f4").tobytes())
    driver.admit("other", 1, wire.Request(1, 9, False, ((wire.Site(0, (huge,), watch=(0,)),),)))
    driver.admit("r", 2, request_of(()))
    run_step(driver, [("r", 0, TOKENS)], {"r": np.ones((2, TOKENS, WIDTH))})
    place = driver.requests["other"].lease.places[0, huge]
    assert place == 0
    assert bool(driver.banks[0].activations[0, place].isinf())
    assert driver.sequences.token_state[0, 1:TOKENS].tolist() == list(range(1, TOKENS))
