"""Writer of TensorBoard event files. TensorBoard's own writer works in a thread, which swallows errors such as a full
disk.
"""

import importlib
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

VERSION = "brain.Event:2"


class EventFile:
    """A new event file in a folder. TensorBoard shows the points of earlier files up to `first_step`, exclusive."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        folder.mkdir(exist_ok=True)
        file = (folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("wb")
        self._records = writer.RecordWriter(file)
        self._write(file_version=VERSION)
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def add(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        point = self._summaries.Summary.Value(tag=name, simple_value=value)
        self._write(step=step, summary=self._summaries.Summary(value=[point]))

    def flush(self) -> None:
        """Flush to disk."""
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())


def open_event_file(folder: Path, first_step: int) -> EventFile | None:
    """Create an event file, or return None if tensorboard is not installed."""
    return EventFile(folder, first_step) if importlib.util.find_spec("tensorboard") else None
