"""The table of docs/openai.md, from the code: `python -m tests.unit.server.http.fields_table` prints it."""

import json
from collections.abc import Iterator

import msgspec

from rudder.server.http.chat import ChatRequest
from rudder.server.http.completions import CompletionRequest
from rudder.server.http.fields import IGNORED, NEUTRAL, REFUSED
from rudder.server.http.responses import ResponsesRequest

FORMS: dict[str, type[msgspec.Struct]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
    "responses": ResponsesRequest,
}
HEAD = ("field", "chat", "completions", "responses")


def names(form: type[msgspec.Struct]) -> set[str]:
    """Return the fields of a request that are taken."""
    return {field.encode_name for field in msgspec.structs.fields(form)}


def rows() -> Iterator[tuple[str, ...]]:
    """Yield the rows: fields that are taken somewhere, and what the others may hold."""
    taken = {kind: names(form) for kind, form in FORMS.items()}
    for field in sorted(set().union(*taken.values())):
        yield f"`{field}`", *("yes" if field in taken[kind] else "no" for kind in FORMS)


def others() -> Iterator[tuple[str, str]]:
    """Yield fields that no endpoint takes, and what becomes of them."""
    for field in sorted({*IGNORED, *NEUTRAL, *REFUSED}):
        if field in IGNORED:
            yield f"`{field}`", f"left out: {IGNORED[field]}"
        elif field in NEUTRAL:
            values = " or ".join(f"`{json.dumps(value)}`" for value in NEUTRAL[field])
            yield f"`{field}`", f"refused but for {values}" + (f": {REFUSED[field]}" if field in REFUSED else "")
        else:
            yield f"`{field}`", f"refused: {REFUSED[field]}"


def line(*cells: str) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return both tables."""
    taken = [line(*HEAD), line(*["---"] * len(HEAD)), *(line(*row) for row in rows())]
    left = [line("field", "where it is not taken"), line("---", "---"), *(line(*row) for row in others())]
    return "\n".join([*taken, "", *left])


if __name__ == "__main__":
    print(table())
