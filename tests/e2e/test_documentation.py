"""Every program and command of README and docs runs: those of `make` as a dry run, since they run these tests."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog
from rudder.server.safety.audit.verify import Place
from rudder.v1 import policy_pb2
from rudder_client import Client
from tests.e2e import published
from tests.e2e.conftest import Running, running
from tests.e2e.documents import DOCUMENTS, REPOSITORY, Block, blocks

pytestmark = pytest.mark.e2e
# Commands of a running server, in running text; `rudder model` alone is one.
COMMANDS = "generate|inspect|features|policy list|policy explain|model(?! get| convert| list)"
INLINE = re.compile(rf"`(?:\.venv/bin/)?rudder ((?:{COMMANDS})\b[^`]*)`")
# Names in commands of what is the reader's.
PLACEHOLDERS = re.compile(r"\b(FOLDER_OR_REPO|MODEL|TEXT|BUNDLE|POLICY\.yaml|LOG|KEY|CORPUS|TEXTS|PRETRAINED)\b")
# Where the documents' programs find the HTTP endpoint.
HTTP = "http://localhost:8000"
# Commands that ask the server of the tests.
ASKING = (
    "generate",
    "inspect",
    "features",
    "model",
    "policy list",
    "policy get",
    "policy apply",
    "policy explain",
    "debug",
)


# The policy of docs/policies.md, which its commands apply.
POLICY = next(block for block in blocks() if block.document == "policies.md" and block.words == ("yaml",))


def named(block: Block) -> str:
    return f"{block.document}-{block.number}"


def runnable(language: str) -> list[Block]:
    """Return the blocks in a language, but those with the word `long` behind it, which take minutes."""
    return [block for block in blocks() if block.words == (language,)]


def long_runs() -> list[Block]:
    """Return the long blocks of each document as one, since a later one reads what an earlier one wrote."""
    long = [block for block in blocks() if block.words == ("sh", "long")]
    documents = dict.fromkeys(block.document for block in long)
    return [Block(name, 0, (), "".join(b.text for b in long if b.document == name)) for name in documents]


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder; return its output, also that on stderr."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rudder(command: str, server: Running) -> list[str]:
    """Return the command line of a documented `rudder` command, for the server of the tests."""
    return [sys.executable, "-m", "rudder.server", *shlex.split(command, comments=True), "--address", server.address]


@pytest.mark.parametrize("block", runnable("python"), ids=named)
def test_program_runs(block: Block, server: Running, tmp_path: Path) -> None:
    text = block.text.replace("localhost:50051", server.address).replace(HTTP, server.http.removesuffix("/v1"))
    assert run([sys.executable, "-c", text], tmp_path)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A path for each placeholder."""
    folder = tmp_path_factory.mktemp("names")
    published.write(folder, latents=400)
    files = {"FOLDER_OR_REPO": folder / "whole", "TEXT": folder / "corpus.jsonl", "BUNDLE": folder / "bundle"}
    (folder / "policy.yaml").write_text(POLICY.text)
    files |= published.write_topics(folder) | {"PRETRAINED": published.MODEL.parent}
    return files | {"MODEL": published.MODEL, "POLICY.yaml": folder / "policy.yaml"} | audited(folder)


def audited(folder: Path) -> dict[str, Path]:
    """Write an audit log and its key."""
    log, key = folder / "audit", folder / "audit.key"
    chain.create_key(key)
    AuditLog.open(Place.of(log), chain.read_key(key), 1 << 20, "never").close()
    return {"LOG": log, "KEY": key}


@pytest.fixture
def emptied(server: Running) -> Iterator[None]:
    """Take back what the commands of a document put in force: a policy without a program binds nobody else."""
    yield
    with Client(server.address) as client:
        for policy in client.policies():
            client.apply(policy_pb2.Policy(name=policy.name, version=policy.version + 1))


def absolute(value: str, folder: Path) -> str:
    """Return a value with the names of what earlier commands wrote into a folder as paths."""
    for path in folder.iterdir():
        value = re.sub(rf"(?<![\w/.-]){re.escape(path.name)}(?![\w/.-])", str(path), value)
    return value


@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize(
    "block",
    [
        *runnable("sh"),
        *(pytest.param(block, marks=(pytest.mark.long, pytest.mark.timeout(1800))) for block in long_runs()),
    ],
    ids=named,
)
def test_commands_run(block: Block, names: dict[str, Path], server: Running, tmp_path: Path) -> None:
    """In their order: a later one may read what an earlier one wrote."""
    for line in filter(str.strip, block.text.replace("\\\n", " ").splitlines()):
        program, *words = shlex.split(PLACEHOLDERS.sub(lambda match: str(names[match[0]]), line), comments=True)
        if program == "make":
            run(["make", "--dry-run", *words], REPOSITORY)
        elif words[0] == "serve":
            values = [absolute(word, tmp_path) for word in words[2::2]]
            flags = dict(zip([word.removeprefix("--") for word in words[1::2]], values, strict=True))
            with running(tmp_path, **flags | {"watch": "[]"}) as started:
                assert started.process.poll() is None
        elif program == "curl":
            run(["curl", "-sSf", *(word.replace(HTTP, server.http.removesuffix("/v1")) for word in words)], tmp_path)
        else:
            assert program == "rudder", f"{named(block)}: no test runs {program}"
            asks = any(" ".join(words).startswith(command) for command in ASKING)
            address = ["--address", server.address] if asks else []
            run([sys.executable, "-m", "rudder.server", *words, *address], tmp_path)


@pytest.mark.parametrize("command", [m[1] for path in DOCUMENTS for m in INLINE.finditer(path.read_text())])
def test_command_of_the_text_runs(command: str, server: Running, tmp_path: Path) -> None:
    assert run(rudder(command, server), tmp_path)


def test_all_documents_have_been_read() -> None:
    languages = {block.words[:1] for block in blocks()}
    assert ("python",) in languages
    assert ("sh",) in languages
    # A block without a language is a drawing or a formula, `console` needs a cluster; others have no runner yet.
    assert languages <= {(), ("python",), ("sh",), ("yaml",), ("json",), ("console",)}
