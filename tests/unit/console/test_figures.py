"""The console's pure functions, in Node; what they return for Python is Python."""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rudder.server.http.console import FOLDER

NODE = shutil.which("node")
FIGURES = FOLDER / "figures.js"
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node")


def node(*arguments: str) -> str:
    result = subprocess.run(
        ["node", *arguments], env=os.environ | {"FIGURES": str(FIGURES)}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_figures() -> None:
    assert "# pass 7" in node("--test", "--test-reporter=tap", str(Path(__file__).with_name("figures.mjs")))


@pytest.mark.parametrize("text", ["true", 'it\'s "true",\nnull', "{true: null}\\n", "true\u2028 \U0001f600"])
def test_code_for_python_has_the_request(text: str) -> None:
    """Words in a prompt that are values of JSON stay as they are."""
    request = {"path": "/v1/completions", "body": {"prompt": text, "echo": False, "rudder": {"flag": True, "n": None}}}
    script = (
        "const { readFileSync } = await import('node:fs');"
        "const source = encodeURIComponent(readFileSync(process.env.FIGURES, 'utf8'));"
        "const { asCode } = await import(`data:text/javascript,${source}`);"
        f"process.stdout.write(asCode('python', {json.dumps(request)}, 'http://localhost'));"
    )
    call = next(
        n for n in ast.walk(ast.parse(node("--input-type=module", "-e", script)))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "create"
    )  # fmt: skip
    fields = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert fields == {"prompt": text, "echo": False, "extra_body": {"rudder": {"flag": True, "n": None}}}
