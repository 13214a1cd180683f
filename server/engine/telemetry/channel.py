"""The way of telemetry from the worker to the server process: messages, in order, over a Unix socket.

A message queue with threads of its own would be woken for every frame, and they would take the cores from the model.
Here nobody is: what has been sent lies in the socket until the server reads it.
"""

import socket
import struct
import threading
from queue import Queue

LENGTH = struct.Struct("<Q")
READ_BYTES = 1 << 18


class Sender:
    """The worker's end. What the socket has no room for a thread sends later: the worker never waits."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address)
        self.waiting: Queue[bytes] = Queue()
        self.thread = threading.Thread(target=self.send_waiting, name="rudder-telemetry", daemon=True)
        self.thread.start()

    def send(self, message: bytes) -> None:
        """Send a message. Raises BrokenPipeError: the server is gone."""
        data = LENGTH.pack(len(message)) + message
        # Behind what waits, everything waits.
        sent = 0 if self.waiting.unfinished_tasks else self.send_at_once(data)
        if sent < len(data):
            self.waiting.put(data[sent:])
            if not self.thread.is_alive():
                raise BrokenPipeError("the server no longer takes telemetry")

    def send_at_once(self, data: bytes) -> int:
        """How many bytes the socket has room for."""
        try:
            return self.socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def send_waiting(self) -> None:
        """Send what waits, as the server makes room."""
        while True:
            self.socket.sendall(self.waiting.get())
            self.waiting.task_done()


class Receiver:
    """The server's end. `ended`: the worker is gone, and all that it sent has been read."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(1)
        self.piece = bytearray(READ_BYTES)
        self.read = bytearray()
        self.ended = False

    def accept(self) -> None:
        """Take the one connection that there is."""
        self.socket, _ = self.listener.accept()
        self.socket.setblocking(False)
        self.listener.close()

    def messages(self) -> list[bytes]:
        """Those that have come; does not wait."""
        self.read_all()
        found, at = [], 0
        while (begin := at + LENGTH.size) <= len(self.read):
            (size,) = LENGTH.unpack_from(self.read, at)
            if begin + size > len(self.read):
                break
            at = begin + size
            found.append(bytes(self.read[begin:at]))
        del self.read[:at]
        return found

    def read_all(self) -> None:
        """Read what the socket holds."""
        size = READ_BYTES
        try:
            while size == READ_BYTES:
                size = self.socket.recv_into(self.piece)
                self.read += memoryview(self.piece)[:size]
        except BlockingIOError:
            return
        self.ended = size == 0
