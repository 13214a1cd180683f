"""Record of a run: metrics.jsonl, and TensorBoard event files if the package is installed.

A line of metrics.jsonl is an object with `step`, `tokens`, `sae` and either `train` or `evaluation`, an object of
figures.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from rudder.sae_models.files import naming_file_in_errors, write_atomically
from rudder.sae_models.training import event_file
from rudder.sae_models.training.event_file import EventFile

METRICS = "metrics.jsonl"
EVENTS = "events"


class Record:
    """The record of a run in a folder, open for appending. Lines after `step` are dropped, because a resumed run writes
    them again.

    With several processes it is enabled in the leader only.
    """

    def __init__(self, folder: Path, step: int, enabled: bool = True) -> None:
        self._path = folder / METRICS
        self._file: IO[str] | None = None
        self._event_file: EventFile | None = None
        if enabled:
            retained = [line for line in lines(self._path) if line["step"] <= step] if self._path.exists() else []
            write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in retained).encode())
            self._file = self._path.open("a", encoding="utf-8")
            self._event_file = event_file.open_event_file(
                folder / EVENTS, max((line["tokens"] for line in retained), default=0) + 1
            )

    def add(self, kind: str, step: int, tokens: int, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Write one line per SAE; scalars also go to TensorBoard. Raise OSError with the path of the file."""
        if self._file is None:
            return
        with naming_file_in_errors(self._path):
            for sae, values in figures.items():
                self._file.write(json.dumps({"step": step, "tokens": tokens, "sae": sae, kind: values}) + "\n")
                for name, value in values.items():
                    if self._event_file is not None and isinstance(value, int | float):
                        self._event_file.add(f"{kind}/{name}/{sae}", value, tokens)
            self._file.flush()
            if self._event_file is not None:
                self._event_file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with naming_file_in_errors(self._path):
            for file in (self._file, self._event_file):
                if file is not None:
                    file.close()


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl; skip the last one if a kill truncated it."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
