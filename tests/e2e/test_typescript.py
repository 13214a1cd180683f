"""The TypeScript client and OpenAI's client for Node, against the server of the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Running
from tests.e2e.documents import REPOSITORY

pytestmark = [pytest.mark.e2e, pytest.mark.network]
FOLDER = REPOSITORY / "clients" / "typescript"


def run(*command: str, folder: Path = FOLDER, **environment: str) -> str:
    """Run a command; return what it printed."""
    result = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built() -> Path:
    """The compiled client; skipped where no package index can be reached."""
    if subprocess.run(["npm", "ping"], cwd=FOLDER, capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("the npm registry cannot be reached")
    run("make", "typescript", f"PY={sys.executable}", "TEST=", folder=REPOSITORY)
    return FOLDER / "dist"


def test_clients_for_node(built: Path, server: Running) -> None:
    output = run(
        "node", "--test", str(built / "test" / "client.test.js"), RUDDER_GRPC=server.address, RUDDER_HTTP=server.http
    )
    assert "# fail 0" in output
    assert "# skipped 0" in output


@pytest.mark.parametrize("example", ["first", "openai"])
def test_examples_for_node(built: Path, server: Running, example: str) -> None:
    address = {"first": server.address, "openai": server.http}[example]
    assert run("node", str(built / "examples" / f"{example}.js"), address)
