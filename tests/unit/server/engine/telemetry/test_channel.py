"""Transport of telemetry: no message is lost, reordered or cut, and the worker does not wait for the server."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.telemetry.channel import Receiver, Sender
from rudder.server.engine.telemetry.frame import Frame, TelemetryLost

KEY = b"k" * 32


@contextmanager
def connected_pair(receiver_key: bytes = KEY) -> Iterator[tuple[Sender, Receiver]]:
    """A connected sender and receiver."""
    with TemporaryDirectory() as folder:
        receiver = Receiver(f"{folder}/telemetry", receiver_key)
        sender = Sender(f"{folder}/telemetry", KEY)
        receiver.accept()
        yield sender, receiver
        sender.socket.close()
        receiver.socket.close()


def read(receiver: Receiver, number: int) -> list[bytes]:
    """The next `number` messages."""
    messages: list[bytes] = []
    deadline = time.monotonic() + 10
    while len(messages) < number and time.monotonic() < deadline:
        messages += receiver.messages()
    return messages


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_messages_arrive_whole_and_in_order_whenever_they_are_read(seed: int) -> None:
    rng = Random(seed)
    sent = [
        rng.randbytes(rng.choice((0, 1, 300, 20_000, 262_136, 262_137, 900_000))) for _ in range(rng.randint(1, 12))
    ]
    with connected_pair() as (sender, receiver):
        received = []
        for message in sent:
            sender.send_message(message)
            if rng.random() < 0.3:
                received += receiver.messages()
        received += read(receiver, len(sent) - len(received))
        assert received == sent
        assert receiver.messages() == []


def test_a_worker_does_not_wait_for_a_server_that_does_not_read() -> None:
    sent = [bytes([number]) * 1_000_000 for number in range(40)]
    with connected_pair() as (sender, receiver):
        # Far more than any socket holds: a send that waited for the reader would never return.
        for message in sent:
            sender.send_message(message)
        assert sender.backlog.unfinished_tasks > 0
        assert read(receiver, len(sent)) == sent
        sender.send_message(b"and the thread is done")
        assert read(receiver, 1) == [b"and the thread is done"]


def test_messages_sent_before_the_worker_ends_are_read() -> None:
    with connected_pair() as (sender, receiver):
        sender.send_message(b"last")
        sender.socket.close()
        assert receiver.messages() == [b"last"]
        receiver.messages()
        assert receiver.disconnected


def test_frames_are_numbered_and_sealed() -> None:
    with connected_pair() as (sender, receiver):
        frames = [Frame(0, flags=b"\1\0\0\0"), Frame(1)]
        for frame in frames:
            sender.send(frame)
        assert list(receiver.frames()) == frames
        assert (sender.sequence, receiver.expected) == (2, 2)
    with connected_pair(receiver_key=b"other" * 6) as (sender, receiver):
        sender.send(Frame(0))
        with pytest.raises(TelemetryLost, match="MAC"):
            list(receiver.frames())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_sending_to_a_server_that_is_gone_is_an_error_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with connected_pair() as (sender, receiver):
        for number in range(10):
            sender.send(Frame(number, activations=bytes(1_000_000)))
        receiver.socket.close()
        sender.thread.join(10)
        with pytest.raises(BrokenPipeError, match="no longer"):
            sender.send(Frame(10))
    with connected_pair() as (sender, receiver):
        receiver.socket.close()
        with pytest.raises(BrokenPipeError):
            sender.send(Frame(0))
    logged = [(record.levelno, record.message) for record in caplog.records if record.name.startswith("rudder.")]
    assert [level for level, _ in logged] == [logging.ERROR] * 2
    assert [message.split(":")[0] for _, message in logged] == [
        "telemetry lost at frame 10",
        "telemetry lost at frame 0",
    ]
