"""docs/openai.md says what the code does: fields, reasons of errors, tests."""

import re
from pathlib import Path

from rudder.server.http.app import ROUTES
from rudder.server.http.methods import LIVE, METHODS
from rudder.server.service.errors import REASONS
from tests.unit.server.http.fields_table import table

ROOT = Path(__file__).parents[4]
DOCUMENT = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(test_\w+)` of `(tests/[\w/]+\.py)`")


def test_the_tables_of_fields_are_those_of_the_code() -> None:
    assert table() in DOCUMENT, (
        "write the output of `python -m tests.unit.server.http.fields_table` into docs/openai.md"
    )


def test_every_route_is_documented() -> None:
    """Those of the OpenAI API. The console's are methods of the contract, or Live."""
    for path in set(ROUTES) - set(METHODS) - {LIVE}:
        assert f"`{path.decode()}`" in DOCUMENT


def test_statuses_are_those_of_the_table_of_errors() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ([A-Z_, ]+) \|", DOCUMENT, re.MULTILINE)
    documented = {reason: int(status) for status, reasons in rows for reason in reasons.split(", ")}
    assert documented == {name: reason.http_status for name, reason in REASONS.items()}


def test_the_tests_that_it_names_exist() -> None:
    named = TEST.findall(DOCUMENT)
    assert len(named) > 10
    for test, file in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (test, file)
