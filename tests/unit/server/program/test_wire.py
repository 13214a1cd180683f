"""The wire form of requests: encoding and derived properties."""

from math import inf
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import random_request

LAYOUT = Layout(("layers.0.resid_post", "layers.1.resid_post"), stages=2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_request_round_trips(seed: int) -> None:
    request = random_request(Random(seed), LAYOUT, tokens=5)
    assert wire.decode(wire.encode(request)) == request
    assert wire.decode(wire.encode(request)).rows() == request.rows()


def test_absent_values_and_infinities_round_trip() -> None:
    edit, sequence = wire.Edit(0, upper=inf, lower=-inf), wire.Sequence(0, binary=None)
    site = wire.Site(0, (wire.Row(),), (edit,), gate=wire.Gate(sequence=sequence), max_displacement=inf)
    assert wire.decode(wire.encode(wire.Request(1, 2, True, ((site,),)))).stages[0][0] == site


@pytest.mark.parametrize("payload", [b"", b"\xc0", msgspec.msgpack.encode([1]), msgspec.msgpack.encode(["a", 2, True])])
def test_invalid_payload_is_refused(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        wire.decode(payload)


def test_truncated_payload_is_refused() -> None:
    payload = wire.encode(random_request(Random(1), LAYOUT, tokens=5))
    for length in range(len(payload)):
        with pytest.raises(msgspec.DecodeError):
            wire.decode(payload[:length])


def test_edits_blends_and_gates_need_a_slot() -> None:
    rows = (wire.Row("toy", 0),)
    needing = (
        wire.Site(0, rows, (wire.Edit(0),)),
        wire.Site(0, rows, blend=wire.Blend(0, 0.5)),
        wire.Site(0, rows, gate=wire.Gate(((0, 1.0),))),
    )
    for site in needing:
        assert wire.Request(1, 2, True, ((), (site,))).edits
    assert not wire.Request(1, 2, True, ((wire.Site(0, rows, watch=(0,)),),)).edits


@pytest.mark.parametrize(
    ("bos", "excluded", "uncounted"),
    [(False, (), ()), (True, (), (0,)), (True, (0, 3), (0, 3)), (True, (2, 3), (0, 2, 3)), (False, (2, 3), (2, 3))],
)
def test_bos_and_excluded_positions_are_not_counted(
    bos: bool, excluded: tuple[int, ...], uncounted: tuple[int, ...]
) -> None:
    request = wire.Request(4, 9, bos, excluded=excluded)
    assert request.uncounted == uncounted
    for end in range(9):
        assert request.counted_before(end) == sum(position not in uncounted for position in range(end))
    assert wire.decode(wire.encode(request)) == request


def test_payload_of_four_edits_is_below_600_bytes() -> None:
    rows = tuple(wire.Row("textbook-lm-layers.2", 1000 + i) for i in range(4))
    site = wire.Site(0, rows, tuple(wire.Edit(i, scale=0.0, shift=-1.5, above=0.0) for i in range(4)))
    assert len(wire.encode(wire.Request(100, 200, True, ((site,),)))) < 600
