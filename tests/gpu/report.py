"""The result of a step of the GPU card: named parts, each with its status and figures, as a JSON file."""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rudder.sae_models.files import write_atomically

PASSED, FAILED, NOT_RUN, TIMED_OUT = "PASSED", "FAILED", "NOT RUN", "TIMED OUT"
NO_GPU = "needs a GPU"
NOT_ENDED = "has not ended"
Figures = Mapping[str, Any]


class Report:
    """Parts of a step, written after each of them: what a step that is killed has found so far stays.

    `planned`: names of parts, which are NOT RUN until they are added.
    """

    def __init__(self, path: Path, planned: Iterable[str] = ()) -> None:
        self.path = path
        self.parts: list[dict[str, Any]] = [{"name": name, "status": NOT_RUN, "reason": NOT_ENDED} for name in planned]
        # What is too long for a table, by name.
        self.details: dict[str, Any] = {}
        self.write()

    def run(self, name: str, part: Callable[[], Figures]) -> None:
        """Run a part, which returns its figures; any exception is its failure, and the step goes on."""
        begin = time.monotonic()
        result: dict[str, Any]
        try:
            result = {"status": PASSED, "figures": dict(part())}
        except Exception as error:
            traceback.print_exc()
            result = {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}
        self.add(name, seconds=round(time.monotonic() - begin, 1), **result)

    def add(self, name: str, status: str, **values: Any) -> None:
        """Add the result of a part, or replace it: its `seconds`, `figures` and, unless it passed, the `reason`."""
        part = {"name": name, "status": status, **values}
        names = [known["name"] for known in self.parts]
        index = names.index(name) if name in names else len(names)
        self.parts[index : index + 1] = [part]
        self.write()

    def not_run(self, name: str, reason: str) -> None:
        """Add a part that did not run."""
        self.add(name, NOT_RUN, reason=reason)

    def write(self) -> None:
        """Write the JSON file. A kill in the middle leaves the one before."""
        content = {"parts": self.parts, "details": self.details}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def exit_status(self) -> int:
        """Return 1 if a part failed."""
        return int(any(part["status"] == FAILED for part in self.parts))


def arguments(description: str | None, *names: str) -> argparse.Namespace:
    """Parse the arguments of a step: `--out` FILE, `--tiny`, and positional ones of these names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU: a rehearsal")
    for name in names:
        parser.add_argument(name)
    return parser.parse_args()
