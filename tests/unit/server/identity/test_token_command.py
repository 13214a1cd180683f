"""`rudder token`: tokens come and go in a file that only its owner reads."""

from pathlib import Path

import pytest

from rudder.server import cli
from rudder.server.identity import certificates, tokens
from rudder.server.identity.errors import CredentialError

IDENTITY = Path(__file__).parents[4] / "docs" / "identity.md"


def create(folder: Path, caller: str, *arguments: str) -> str:
    out = folder / f"{caller}.token"
    command = ["token", "create", "--file", str(folder / "tokens.yaml"), "--caller", caller, "--roles", "generate"]
    assert cli.main([*command, "--out", str(out), *arguments]) == 0
    return out.read_text().strip()


def test_created_tokens_are_accepted_until_they_are_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.yaml"
    first, second = create(tmp_path, "a", "--streams", "3"), create(tmp_path, "b", "--days", "1")
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a.token").stat().st_mode & 0o777 == 0o600
    known = tokens.parse(file.read_bytes())
    assert (known.caller(first).quotas.streams, known.caller(second).id) == (3, "b")
    assert cli.main(["token", "list", "--file", str(file)]) == 0
    listed = capsys.readouterr().out
    assert "streams 3" in listed
    assert first.rpartition(".")[2] not in listed
    assert cli.main(["token", "revoke", "--file", str(file), first.split(".")[1]]) == 0
    known = tokens.parse(file.read_bytes())
    assert known.caller(second).id == "b"
    with pytest.raises(CredentialError):
        known.caller(first)


def test_file_that_is_wrong_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text("tokens: 3")
    assert cli.main(["token", "create", "--file", str(file), "--caller", "a", "--roles", "generate"]) == 2
    assert file.read_text() == "tokens: 3"


def test_documented_file_of_certificates_is_one() -> None:
    block = IDENTITY.read_text().partition("```yaml\n")[2].partition("```")[0]
    known = certificates.parse(block.encode())
    caller = certificates.caller(["spiffe://example.org/chat-app"], known)
    assert (caller.id, caller.roles) == ("chat-app", frozenset({"generate"}))
    with pytest.raises(CredentialError):
        certificates.caller(["spiffe://example.org/another"], known)
