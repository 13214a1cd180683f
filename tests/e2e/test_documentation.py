"""Every program and command of README and docs runs, but for blocks whose fence says `no-run` after the language."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.conftest import Running

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands of a running server, in running text.
INLINE = re.compile(r"`(?:\.venv/bin/)?rudder ((?:generate|inspect|features|model)\b[^`]*)`")
# Blocks that no test runs: they start what tests start otherwise, or need files of the reader.
MAX_NOT_RUN = 8


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


def runnable(language: str) -> list[Block]:
    return [block for block in blocks() if block.words[:1] == (language,) and "no-run" not in block.words]


def named(block: Block) -> str:
    return f"{block.document}-{block.number}"


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder; return its output, also that on stderr."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rudder(command: str, server: Running) -> list[str]:
    """Return the command line of a documented `rudder` command, for the server of the tests."""
    return [sys.executable, "-m", "rudder.server", *shlex.split(command, comments=True), "--address", server.address]


@pytest.mark.parametrize("block", runnable("python"), ids=named)
def test_program_runs(block: Block, server: Running, tmp_path: Path) -> None:
    text = block.text.replace("localhost:50051", server.address)
    assert run([sys.executable, "-c", text], tmp_path)


@pytest.mark.parametrize("block", runnable("sh"), ids=named)
def test_commands_run(block: Block, server: Running, tmp_path: Path) -> None:
    for line in filter(str.strip, block.text.replace("\\\n", " ").splitlines()):
        program, _, arguments = line.partition(" ")
        assert program == "rudder", f"{named(block)}: mark the block no-run, or give {program} a test"
        run(rudder(arguments, server), tmp_path)


@pytest.mark.parametrize("command", [m[1] for path in DOCUMENTS for m in INLINE.finditer(path.read_text())])
def test_command_of_the_text_runs(command: str, server: Running, tmp_path: Path) -> None:
    assert run(rudder(command, server), tmp_path)


def test_all_documents_have_been_read() -> None:
    languages = {block.words[:1] for block in blocks()}
    assert ("python",) in languages
    assert ("sh",) in languages
    # A block without a language is a drawing or a formula; other languages have no runner yet.
    assert languages <= {(), ("python",), ("sh",), ("yaml",)}
    assert len([block for block in blocks() if "no-run" in block.words]) <= MAX_NOT_RUN


def test_every_make_target_of_a_block_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = {t for block in blocks() for t in re.findall(r"^make ([a-z0-9-]+)", block.text, re.MULTILINE)}
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("block", [b for b in blocks() if "no-run" in b.words], ids=named)
def test_commands_that_are_not_run_exist(block: Block) -> None:
    """Their flags too: `--help` of the command names each."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if not line.startswith("rudder "):
            continue
        words = shlex.split(line, comments=True)[1:]
        command = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        text = run([sys.executable, "-m", "rudder.server", *command, "--help"], REPOSITORY)
        for flag in re.findall(r" (--[a-z_.-]+)", line):
            assert flag in text, f"{line}: {flag}"
