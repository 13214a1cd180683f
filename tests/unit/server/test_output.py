"""What commands print of an answer's end."""

import pytest
from rich.console import Console

from rudder.server.cli import output
from rudder_client import AppliedPolicy, Attestation, Chunk, Refusal, Verdict


def printed(chunk: Chunk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what is printed on stderr."""
    monkeypatch.setattr(output, "err", Console(stderr=True, highlight=False, soft_wrap=True))
    output.print_end_of_choice(chunk)
    return capsys.readouterr().err


def test_refusal_is_printed_in_the_operators_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = (Verdict("hazard", 17, None), Verdict("note", 12, None))
    policies = AppliedPolicy("safe", 1, "d", False, verdicts), AppliedPolicy("next", 2, "d", True, verdicts[:1])
    attestation = Attestation("", "", (), 20, "e", policies=policies)
    refusal = Refusal("safe", "hazard", "[Not] here.", 17, None)
    chunk = Chunk(0, "", (), (), None, "refused", "", (), None, attestation, refusal=refusal)
    assert printed(chunk, monkeypatch, capsys).splitlines() == [
        "Refused by policy safe: [Not] here.",
        "rule hazard held at token 17",
        "safe: rule note held at token 12",
        "next (shadow): rule hazard held at token 17",
    ]
