"""Write the table of all series into docs/monitoring.md: `python -m rudder.server.monitoring.table FILE`."""

import sys
from itertools import groupby
from pathlib import Path

from rudder.server.monitoring.series import TABLE, Series

BEGIN, END = "<!-- series: make metrics-table -->\n", "<!-- end of series -->"


def markdown() -> str:
    """Return the table, noun by noun."""
    lines = ["| series | type | labels | |", "|---|---|---|---|"]
    for noun, members in groupby(TABLE, key=lambda each: each.noun):
        lines += [f"| **{noun}** | | | |", *(row(each) for each in members)]
    return "\n".join(lines) + "\n"


def row(each: Series) -> str:
    """Return the line of a series."""
    name = f"{each.name}_total" if each.kind == "counter" else each.name
    labels = "; ".join(f"`{label.name}`: {label.bound}" for label in each.labels)
    return f"| `{name}` | {each.kind} | {labels} | {each.help} |"


def updated(text: str) -> str:
    """Return a document with the present table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no table between {BEGIN.strip()!r} and {END!r}")
    return f"{before}{BEGIN}{markdown()}{END}{after}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(updated(document.read_text(encoding="utf-8")), encoding="utf-8")
