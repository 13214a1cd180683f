"""What the worker tells the server after each step: one authenticated frame, numbered without gaps.

Columns are raw little-endian arrays; the server knows their widths from the requests it sent.
"""

import hashlib
import hmac
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

MAC_BYTES = 16
Array = NDArray[Any]


class TelemetryLost(Exception):
    """A frame is missing, repeated, forged, or of another engine's life."""


class Capture(msgspec.Struct, frozen=True, array_like=True):
    """Residuals of a request's tokens of this step at a site, before and after its edits, fp32 [tokens, d]."""

    handle: int
    site: int
    before: bytes
    after: bytes


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One step. R requests were in it; each column lists them in the order of `handles`.

    handles int64 [R], starts int32 [R] (position of the first token), lengths int32 [R], all left out if it `goes_on`:
    the same requests as in the last step, with their next tokens, as many as then; `moved` int32: tokens touched,
    per edit and blend; `active` fp32: activations [tokens, watched rows] of every request that watches; `top_values`
    fp32 and `top_latents` int32: [tokens, k] per top-k site; `pinned` fp64 [pinned rows, 4]: active tokens,
    tokens, sum and maximum; `released` int64: requests that hold nothing any more.
    """

    sequence: int
    goes_on: bool = False
    handles: bytes = b""
    starts: bytes = b""
    lengths: bytes = b""
    moved: bytes = b""
    active: bytes = b""
    top_values: bytes = b""
    top_latents: bytes = b""
    captures: tuple[Capture, ...] = ()
    pinned: bytes = b""
    released: bytes = b""


def seal(frame: Frame, key: bytes) -> bytes:
    """The frame with its MAC in front."""
    body = msgspec.msgpack.encode(frame)
    return mac(body, key) + body


def unseal(message: bytes, key: bytes, expected: int) -> Frame:
    """The frame, if it is authentic and number `expected`; TelemetryLost otherwise."""
    body = message[MAC_BYTES:]
    if not hmac.compare_digest(message[:MAC_BYTES], mac(body, key)):
        raise TelemetryLost("a telemetry frame with a wrong MAC")
    frame = msgspec.msgpack.decode(body, type=Frame)
    if frame.sequence != expected:
        raise TelemetryLost(f"telemetry frame {frame.sequence} came where {expected} was due")
    return frame


def mac(body: bytes, key: bytes) -> bytes:
    """Keyed BLAKE2b; the key is drawn anew for every start of the engine."""
    return hashlib.blake2b(body, key=key, digest_size=MAC_BYTES).digest()


def column(data: bytes, dtype: str) -> Array:
    """A frame's column as an array."""
    return np.frombuffer(data, dtype)
