"""Transport of telemetry from the engine process to the server process: sealed frames, in order, over a Unix socket.

A message queue with threads of its own would wake up for every frame and take cores from the model. Here nothing wakes
up: what has been sent stays in the socket until the server reads it.
"""

import logging
import socket
import struct
import threading
from collections.abc import Iterator
from queue import Queue

from rudder.server import failpoints
from rudder.server.engine.telemetry.frame import Frame, seal, unseal

LENGTH = struct.Struct("<Q")
READ_BYTES = 1 << 18
logger = logging.getLogger(__name__)


class Sender:
    """The worker's end. `sequence`: number of the next frame.

    A thread sends later what the socket has no room for, so that the worker never waits for the server.
    """

    def __init__(self, address: str, key: bytes) -> None:
        self.key, self.sequence = key, 0
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address)
        self.backlog: Queue[bytes] = Queue()
        self.thread = threading.Thread(target=self.send_backlog, name="rudder-telemetry", daemon=True)
        self.thread.start()

    def send(self, frame: Frame) -> None:
        """Send a frame. Raises BrokenPipeError: the server no longer reads."""
        try:
            if not failpoints.hit("telemetry.send"):
                self.send_message(seal(frame, self.key))
        except OSError as error:
            logger.error("telemetry lost at frame %d: %s", frame.sequence, error)
            raise
        self.sequence += 1

    def send_message(self, message: bytes) -> None:
        """Send a message, behind those that are still waiting for room."""
        data = LENGTH.pack(len(message)) + message
        sent = 0 if self.backlog.unfinished_tasks else self.send_nonblocking(data)
        if sent < len(data):
            self.backlog.put(data[sent:])
            if not self.thread.is_alive():
                raise BrokenPipeError("the server no longer takes telemetry")

    def send_nonblocking(self, data: bytes) -> int:
        """Send as many bytes as the socket has room for; their number."""
        try:
            return self.socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def send_backlog(self) -> None:
        """Send what is waiting, as the server makes room."""
        while True:
            self.socket.sendall(self.backlog.get())
            self.backlog.task_done()


class Receiver:
    """The server's end. `expected`: number of the next frame; `disconnected`: the worker is gone, all of it is read."""

    def __init__(self, address: str, key: bytes) -> None:
        self.key, self.expected = key, 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(1)
        self.buffer = bytearray(READ_BYTES)
        self.received = bytearray()
        self.disconnected = False

    def accept(self) -> None:
        """Accept the worker's connection, the only one."""
        self.socket, _ = self.listener.accept()
        self.socket.setblocking(False)
        self.listener.close()

    def frames(self) -> Iterator[Frame]:
        """The frames that have arrived; does not wait. Raises TelemetryLost at the first that is not the next one."""
        for message in self.messages():
            frame = unseal(message, self.key, self.expected)
            self.expected += 1
            yield frame

    def messages(self) -> list[bytes]:
        """The messages that have arrived whole; does not wait."""
        self.read_socket()
        messages, end = [], 0
        while (start := end + LENGTH.size) <= len(self.received):
            (size,) = LENGTH.unpack_from(self.received, end)
            if start + size > len(self.received):
                break
            end = start + size
            messages.append(bytes(self.received[start:end]))
        del self.received[:end]
        return messages

    def read_socket(self) -> None:
        """Read what the socket holds."""
        size = READ_BYTES
        try:
            while size == READ_BYTES:
                size = self.socket.recv_into(self.buffer)
                self.received += memoryview(self.buffer)[:size]
        except BlockingIOError:
            return
        self.disconnected = size == 0
