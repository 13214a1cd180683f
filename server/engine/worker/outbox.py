"""Frames on their way to the server, in the order of their steps."""

from collections import deque
from threading import Lock

from rudder.server.engine.telemetry.channel import Sender
from rudder.server.engine.worker.reader import PendingFrame


class Outbox:
    """Holds the frames of steps that the device still computes. `frames`: how many were ever put in.

    Steps are put in by the thread that runs them, and sent by the one in which vLLM collects their tokens.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender, self.frames = sender, sender.sequence
        self.pending: deque[PendingFrame] = deque()
        self.lock = Lock()

    def put(self, frame: PendingFrame) -> None:
        """Put in the frame of the next step."""
        self.pending.append(frame)
        self.frames += 1

    def send(self, frames: int) -> None:
        """Send the first `frames` of all frames, waiting for their values; returns at once if they were sent.

        Raises BrokenPipeError: the server no longer reads.
        """
        with self.lock:
            while self.sender.sequence < frames:
                self.sender.send(self.pending[0].frame(self.sender.sequence))
                self.pending.popleft()
