"""`rudder policy`: files are checked without a server, and a policy that is printed is one that can be read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rudder.server.cli import main
from rudder.server.cli.policy import POLICY_COMMANDS
from rudder.server.cli.policy.files import written
from rudder.server.program.named import read_policy
from tests.unit.policies import editing, message
from tests.unit.server.safety.test_documented import EXAMPLE


def changed(folder: Path, **fields: Any) -> str:
    """The path of the documented policy with some fields changed."""
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE) | fields))
    return str(path)


def test_valid_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "validate", changed(tmp_path)]) == 0
    assert capsys.readouterr().out == "quiet-stars, version 1: no problem\n"


def test_every_problem_of_a_file_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(tmp_path, version=0, bundles={}, forbidden_fields=["sampling.x"])
    assert main(["policy", "validate", path]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert {line.removeprefix(f"{path}: ").partition(":")[0] for line in lines} == {
        "version",
        "forbidden_fields[0]",
        "program.sites[0].edits[0].row.feature.bundle",
        "locked[0].row.feature.bundle",
    }


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({"sites": []}, "policies.yaml: is a program"), ({"gates": []}, "gates"), ({}, "no_bundles")],
)
def test_what_is_no_policy_is_a_users_error(
    fields: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(yaml.safe_dump({"name": "x"} | fields))
    flags = [] if fields else ["--engine.bundles", "[no_bundles]"]
    assert main(["policy", "validate", str(path), *flags]) == 2
    assert problem in capsys.readouterr().err.replace("\n", " ")


def test_printed_policy_is_a_file(tmp_path: Path) -> None:
    policy = message(program=editing(5), maxDisplacement=0.5, description="über")
    path = tmp_path / "policy.yaml"
    path.write_text(written(policy))
    assert read_policy(path) == policy


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$ref"] == "#/$defs/Policy"


@pytest.mark.parametrize("name", [name for name in POLICY_COMMANDS if name not in ("derive", "certify")])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["policy", name, "--help"])
    assert caught.value.code == 0
    assert f"rudder policy {name}" in capsys.readouterr().out
