"""The documents whose programs, commands and output the tests run, and their fenced blocks."""

import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: language and other words behind the fence, and its text."""

    document: str
    number: int
    words: tuple[str, ...]
    text: str


def blocks() -> list[Block]:
    """Return all fenced blocks of the documents."""
    return [
        Block(path.name, number, tuple(match[1].split()), match[2])
        for path in DOCUMENTS
        for number, match in enumerate(FENCE.finditer(path.read_text()))
    ]


def not_shown(output: str) -> float:
    """Return the share of the lines of README's excerpt of the tour that an output of the tour has not."""
    (shown,) = [block.text for block in blocks() if block.text.startswith("1. Steering")]
    excerpt, lines = [line for line in shown.splitlines() if line.strip()], set(output.splitlines())
    return sum(line not in lines for line in excerpt) / len(excerpt)
