"""A frame that is missing, repeated, forged or truncated raises TelemetryLost."""

import numpy as np
import pytest

from rudder.server.engine.telemetry.frame import MAC_BYTES, Capture, Frame, TelemetryLost, column, seal, unseal

KEY = b"k" * 32
FRAME = Frame(3, handles=b"\1" * 8, activations=b"\0" * 4, captures=(Capture(1, 0, b"ab", b"cd"),), released=b"\2" * 8)


def test_round_trip() -> None:
    assert unseal(seal(FRAME, KEY), KEY, 3) == FRAME


@pytest.mark.parametrize("expected", [0, 2, 4])
def test_a_gap_and_a_repeat_are_errors(expected: int) -> None:
    with pytest.raises(TelemetryLost, match=f"frame 3 came where {expected} was due"):
        unseal(seal(FRAME, KEY), KEY, expected)


def test_a_frame_sealed_with_another_key_is_refused() -> None:
    with pytest.raises(TelemetryLost, match="MAC"):
        unseal(seal(FRAME, b"o" * 32), KEY, 3)


def test_every_changed_byte_is_detected() -> None:
    message = seal(FRAME, KEY)
    for i in range(len(message)):
        forged = message[:i] + bytes([message[i] ^ 1]) + message[i + 1 :]
        with pytest.raises(TelemetryLost):
            unseal(forged, KEY, 3)


def test_every_truncation_is_detected() -> None:
    message = seal(FRAME, KEY)
    for length in range(len(message)):
        with pytest.raises(TelemetryLost):
            unseal(message[:length], KEY, 3)


def test_the_frame_without_its_mac_is_refused() -> None:
    with pytest.raises(TelemetryLost):
        unseal(seal(FRAME, KEY)[MAC_BYTES:], KEY, 3)


def test_columns_are_little_endian() -> None:
    assert column(b"\1\0\0\0\0\1\0\0", "<i4").tolist() == [1, 256]
    assert column(np.array([1.5], "<f4").tobytes(), "<f4").tolist() == [1.5]
