"""What a run writes down as it goes: metrics.jsonl, and TensorBoard's events where the package is installed.

A line of metrics.jsonl is an object with `step`, `tokens`, `sae` and either `train` or `evaluation`, an object of
figures.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from rudder.sae_models.files import naming, write_whole
from rudder.sae_models.training import board
from rudder.sae_models.training.board import Board

METRICS = "metrics.jsonl"
EVENTS = "events"


class Record:
    """The record of a run in a folder, open for appending; what is behind `step` is cut off, as it will come again.

    Of several processes only the one that `speaks` writes.
    """

    def __init__(self, folder: Path, step: int, speaks: bool = True) -> None:
        self._path = folder / METRICS
        self._file: IO[str] | None = None
        self._board: Board | None = None
        if speaks:
            kept = [line for line in lines(self._path) if line["step"] <= step] if self._path.exists() else []
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = self._path.open("a", encoding="utf-8")
            self._board = board.begun(folder / EVENTS, max((line["tokens"] for line in kept), default=0) + 1)

    def add(self, kind: str, step: int, tokens: int, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes a line for each SAE; single numbers go to TensorBoard also. OSError names the file."""
        if self._file is None:
            return
        with naming(self._path):
            for sae, found in figures.items():
                self._file.write(json.dumps({"step": step, "tokens": tokens, "sae": sae, kind: found}) + "\n")
                for name, value in found.items():
                    if self._board is not None and isinstance(value, int | float):
                        self._board.add(f"{kind}/{name}/{sae}", value, tokens)
            self._file.flush()
            if self._board is not None:
                self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._path):
            for file in (self._file, self._board):
                if file is not None:
                    file.close()


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; the last is left out if a kill cut it short."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
