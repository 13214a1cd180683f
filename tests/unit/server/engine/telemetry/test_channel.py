"""Telemetry on its way: nothing is lost, reordered or cut, and the worker does not wait for the server."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.telemetry.channel import Receiver, Sender


@contextmanager
def both_ends() -> Iterator[tuple[Sender, Receiver]]:
    """A connected pair."""
    with TemporaryDirectory() as folder:
        receiver = Receiver(f"{folder}/telemetry")
        sender = Sender(f"{folder}/telemetry")
        receiver.accept()
        yield sender, receiver
        sender.socket.close()
        receiver.socket.close()


def read(receiver: Receiver, number: int) -> list[bytes]:
    """The next `number` messages."""
    found: list[bytes] = []
    deadline = time.monotonic() + 10
    while len(found) < number and time.monotonic() < deadline:
        found += receiver.messages()
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_messages_come_whole_and_in_order_whenever_they_are_read(seed: int) -> None:
    rng = Random(seed)
    sent = [
        rng.randbytes(rng.choice((0, 1, 300, 20_000, 262_136, 262_137, 900_000))) for _ in range(rng.randint(1, 12))
    ]
    with both_ends() as (sender, receiver):
        came = []
        for message in sent:
            sender.send(message)
            if rng.random() < 0.3:
                came += receiver.messages()
        came += read(receiver, len(sent) - len(came))
        assert came == sent
        assert receiver.messages() == []


def test_a_worker_whose_frames_nobody_reads_goes_on() -> None:
    sent = [bytes([number]) * 1_000_000 for number in range(40)]
    with both_ends() as (sender, receiver):
        # Far more than any socket holds: a send that waited for the reader would never return.
        for message in sent:
            sender.send(message)
        assert sender.waiting.unfinished_tasks > 0
        assert read(receiver, len(sent)) == sent
        sender.send(b"and the thread is done")
        assert read(receiver, 1) == [b"and the thread is done"]


def test_the_last_words_of_a_worker_are_read() -> None:
    with both_ends() as (sender, receiver):
        sender.send(b"last")
        sender.socket.close()
        assert receiver.messages() == [b"last"]
        receiver.messages()
        assert receiver.ended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_whose_server_is_gone_is_told() -> None:
    with both_ends() as (sender, receiver):
        for _ in range(10):
            sender.send(bytes(1_000_000))
        receiver.socket.close()
        sender.thread.join(10)
        with pytest.raises(BrokenPipeError, match="no longer"):
            sender.send(b"lost")
    with both_ends() as (sender, receiver):
        receiver.socket.close()
        with pytest.raises(BrokenPipeError):
            sender.send(b"lost")
