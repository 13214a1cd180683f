"""The telemetry of one step, from the worker to the server: an authenticated frame, numbered without gaps.

Columns are raw little-endian arrays; the server knows their widths from the requests that it sent.
"""

import hashlib
import hmac
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

MAC_BYTES = 16
Array = NDArray[Any]
# Columns of `Frame.pinned`: what a pinned row's activations were over the tokens of a step.
PINNED = ("active_tokens", "tokens", "sum", "maximum")
# Columns of `Frame.rejected`: an edit, by its number in the `edited` column of the request, at a token.
REJECTED = ("handle", "position", "edit")


class TelemetryLost(Exception):
    """A frame is missing, repeated or forged, or an engine that was started before sent it."""


class Capture(msgspec.Struct, frozen=True, array_like=True):
    """Residuals of a request's tokens of this step at site number `site`, around its edits, float32 [tokens, d]."""

    handle: int
    site: int
    before: bytes
    after: bytes


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Telemetry of one step. Its R requests come in the order of `handles`, also in every other column.

    sequence: number of the frame since the channel opened.
    continues: the step is the next decode step of the same batch, one more token of each request than in the frame
        before; handles, starts and lengths are left out.
    handles int64 [R], starts int32 [R]: position of the first token, lengths int32 [R]: tokens in this step.
    flags uint8: for each request, [tokens, edits + gates]: whether each of its edits and blends edited the token, then
        whether each of its gates was open at it. By token, since tokens may be computed again one by one.
    statistics float64: for each request, the statistic of each of its gates with a sequence condition, after the step.
    activations float32: for each request that watches rows, [tokens reported, rows].
    top_values float32, top_latents int32: for each request and each of its top-k sites, [tokens reported, k].
    pinned float64 [pinned rows, len(PINNED)].
    released int64: handles of requests that hold no resources any more.
    rejected int64 [edits rejected, len(REJECTED)]: edits that would have left the range of finite values.
    """

    sequence: int
    continues: bool = False
    handles: bytes = b""
    starts: bytes = b""
    lengths: bytes = b""
    flags: bytes = b""
    statistics: bytes = b""
    activations: bytes = b""
    top_values: bytes = b""
    top_latents: bytes = b""
    captures: tuple[Capture, ...] = ()
    pinned: bytes = b""
    released: bytes = b""
    rejected: bytes = b""


def seal(frame: Frame, key: bytes) -> bytes:
    """Encode a frame, with its MAC in front."""
    body = msgspec.msgpack.encode(frame)
    return mac(body, key) + body


def unseal(message: bytes, key: bytes, expected: int) -> Frame:
    """Decode a sealed frame. Raises TelemetryLost unless it is authentic and its number is `expected`."""
    body = message[MAC_BYTES:]
    if not hmac.compare_digest(message[:MAC_BYTES], mac(body, key)):
        raise TelemetryLost("a telemetry frame with a wrong MAC")
    frame = msgspec.msgpack.decode(body, type=Frame)
    if frame.sequence != expected:
        raise TelemetryLost(f"telemetry frame {frame.sequence} came where {expected} was due")
    return frame


def mac(body: bytes, key: bytes) -> bytes:
    """Keyed BLAKE2b (RFC 7693); every start of the engine draws a new key."""
    return hashlib.blake2b(body, key=key, digest_size=MAC_BYTES).digest()


def column(data: bytes, dtype: str) -> Array:
    """View a frame's column as an array."""
    return np.frombuffer(data, dtype)
