"""The `rudder` command: every error that the user can correct is one line on stderr and exit status 2."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rudder.sae_models import PRETRAINED, errors, settings
from rudder.sae_models.bundle.bundle import BundleError
from rudder.sae_models.training import config as training
from rudder.sae_models.training import report
from rudder.server import cli
from rudder.server import config as configuration
from rudder.server.cli import generate, serve

MODEL, BUNDLE = str(PRETRAINED / "textbook-lm"), str(PRETRAINED / "textbook-lm-layers.2")
CLOSED = "--address=localhost:1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that no command can use."""
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "wrong.yaml").write_text("a: [1\nb: {")
    (tmp_path / "latin1.yaml").write_bytes(b"model: \xe9")
    (tmp_path / "unknown.yaml").write_text("engnie: {}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "no manifest").mkdir()
    (tmp_path / "no manifest" / "manifest.json").write_text('{"name":')
    shutil.copytree(BUNDLE, tmp_path / "damaged")
    with (tmp_path / "damaged" / "sae.safetensors").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["config", "show", "--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["config", "show", "--config", "folder"], "folder: Is a directory"),
        (["config", "show", "--config", "wrong.yaml"], "wrong.yaml: while parsing a flow"),
        (["config", "show", "--config", "latin1.yaml"], "latin1.yaml: 'utf-8' codec"),
        (["config", "show", "--config", "unknown.yaml"], "engnie: there is no such field; did you mean engine?"),
        (["config", "show", "--engine.rowz", "3"], "engine.rowz: there is no such field; did you mean engine.rows?"),
        (["config", "show", "--engine.rows=many"], "engine.rows: Expected `int`, got `str` 'many'"),
        (["serve", "--config", "wrong.yaml"], "wrong.yaml: while parsing a flow"),
        (["serve", "--listen.host", "192.0.2.1"], "listen.port: cannot listen on 192.0.2.1:50051"),
        (
            ["serve", "--listen.host", "0.0.0.0", "--listen.port", "0", "--listen.metrics_port", "0"],
            "tls.certificate: 0.0.0.0 is reached from other machines",
        ),
        (
            [
                "serve",
                "--listen.host",
                "0.0.0.0",
                "--listen.port",
                "0",
                "--listen.metrics_port",
                "0",
                "--listen.allow_plaintext",
                "true",
            ],
            "identity.tokens: 0.0.0.0 is reached from other machines",
        ),
        (["token", "create", "--file", "t.yaml", "--caller", "a", "--roles", "root"], "token.roles: 'root' is not one"),
        (["token", "revoke", "--file", "t.yaml", "0" * 16], "[Errno 2] No such file or directory: 't.yaml'"),
        (["generate", "x", "--client-key", "wrong.yaml"], "--client-certificate and --client-key belong together"),
        (["generate", "x", CLOSED], "UNAVAILABLE: "),
        (["generate", "x", CLOSED, "--program", "wrong.yaml"], "wrong.yaml: while parsing a flow"),
        (["generate", "x", CLOSED, "--program", "nowhere.yaml"], "[Errno 2] No such file or directory: 'nowhere.yaml'"),
        (["inspect", "x", CLOSED, "--program", "empty.yaml"], "empty.yaml: is not a mapping"),
        (["inspect", "x", CLOSED], "UNAVAILABLE: "),
        (["inspect", "x", CLOSED, "--strength", "1"], "--strength: needs --topic"),
        (["generate", "x", CLOSED, "--topic", "astronomy", "--strength", "1"], "UNAVAILABLE: "),
        (["features", CLOSED, "--search", "x"], "UNAVAILABLE: "),
        (["model", CLOSED], "UNAVAILABLE: "),
        (["model", "get", "nothing"], "nothing: there is no model of this name; the models are smollm2-135m-instruct"),
        (["model", "convert", "nowhere.gguf", "--out", "x"], "[Errno 2] No such file or directory: 'nowhere.gguf'"),
        (["model", "convert", "folder", "--out", "made"], "[Errno 21] Is a directory: 'folder'"),
        (["model", "convert", "empty.yaml", "--out", "made"], "empty.yaml: is not a GGUF file"),
        (["model", "convert", "empty.yaml", "--out", "damaged"], "out: damaged is there and not empty"),
        (["steer", "show", "nowhere"], "nowhere/concepts.yaml: [Errno 2] No such file or directory"),
        (["steer", "calibrate", "x", "--model", MODEL, "--corpus", "x"], "topics: name some by --book or --topics"),
        (
            ["steer", "calibrate", "x", "--model", MODEL, "--corpus", "x", "--topics", "wrong.yaml"],
            "topics: wrong.yaml",
        ),
        (
            ["eval", "steering", "nowhere", "--model", MODEL, "--corpus", "x"],
            "book: name some, as there is no nowhere/",
        ),
        (["bundle", "check", "nowhere"], "bundle: nowhere is not a folder"),
        (["bundle", "import", "nowhere", "--model", MODEL, "--out", "made"], "nowhere: neither a path nor"),
        (["bundle", "import", "folder", "--model", MODEL, "--out", "made"], "folder: "),
        (["train", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["train", "empty.yaml"], "out: is missing"),
        (["train", "wrong.yaml"], "wrong.yaml: while parsing a flow"),
        (["train", "folder"], "folder: Is a directory"),
        (["harvest", "empty.yaml"], "out: is missing"),
        (["harvest", "unknown.yaml"], "engnie: there is no such field"),
        (["report", "nowhere"], "[Errno 2] No such file or directory: 'nowhere/metrics.jsonl'"),
        (["report", "empty.yaml"], "[Errno 20] Not a directory: 'empty.yaml/metrics.jsonl'"),
        (["sae", "compare", "nowhere", BUNDLE], "nowhere: "),
        (["sae", "compare", "damaged", BUNDLE], "files.sae.safetensors: "),
        (["sae", "compare", "no manifest", BUNDLE], "manifest.json: "),
        (
            ["program", "derive", "--corpus", "empty.jsonl", "--bundle", BUNDLE, "--model", "folder", "--out", "made"],
            "model: no config.json in folder",
        ),
        (
            [
                "program",
                "evaluate",
                "--corpus",
                "x",
                "--bundle",
                "damaged",
                "--model",
                MODEL,
                "--program",
                "wrong.yaml",
            ],
            "program: wrong.yaml: while parsing a flow",
        ),
        (
            ["bench", "engine", "--shape", "x"],
            "shape: invalid value 'x'; expected llama-100m|llama-8b|llama-8b-4-layers|tiny",
        ),
        (["bench", "engine", "--cases", "x"], "cases: 'x' is not one of idle"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_user_error_is_one_line_and_status_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"rudder: {problem}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--max-tokens", "-5"],
        ["generate", "x", "--seed", "18446744073709551616"],
        ["generate", "x", "--n", "9" * 5000],
        ["program", "evaluate", "--length", "1"],
        ["generate", "\udcff"],
        ["model", "get"],
        ["model", "convert", "x.gguf"],
        ["model", "nothing"],
        ["features", "--limit", "many"],
        ["config", "show", "--engine.rows"],
        ["train"],
        ["report"],
        ["nothing"],
        [],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        cli.main(arguments)
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("rudder")


@pytest.mark.parametrize("bundle", ["damaged", "no manifest", "nowhere"])
def test_serve_refuses_a_damaged_bundle_before_the_engine_starts(folder: Path, bundle: str) -> None:
    command = [sys.executable, "-m", "rudder.server", "serve", "--listen.port=0", "--listen.metrics_port=0"]
    result = subprocess.run(
        [*command, "--engine.bundles", str(folder / bundle)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("rudder: ")
    assert "Initializing a V1 LLM engine" not in result.stderr + result.stdout


def test_bugs_keep_their_traceback_and_interrupts_are_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path) -> Path:
        raise KeyboardInterrupt

    def bug(_: Path) -> Path:
        raise ValueError("a bug")

    monkeypatch.setattr(report, "write", interrupted)
    assert cli.main(["report", "run"]) == 130
    monkeypatch.setattr(report, "write", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["report", "run"])


def test_errors_for_users_have_one_base() -> None:
    assert issubclass(BundleError, errors.UserError)
    assert configuration.ConfigError is training.ConfigError is settings.ConfigError
    assert issubclass(settings.ConfigError, errors.UserError)


def test_help_and_version_load_neither_torch_nor_vllm() -> None:
    script = (
        "import sys; from rudder.server import cli\n"
        "try: cli.main([sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "print(*({'torch', 'vllm', 'transformers', 'numpy'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    for option in ("--help", "--version"):
        result = subprocess.run([sys.executable, "-c", script, option], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        cli.main([command, "--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: rudder {command}" in text
    assert command == "demo" or "example" in text


def test_help_of_serve_lists_every_field_with_help_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for field in settings.fields(configuration.Config):
        assert f"--{field.name} " in text
        assert field.help in text
    assert "row places in the bank of each site (256)" in text


def test_config_example_is_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "example"]) == 0
    (tmp_path / "example.yaml").write_text(capsys.readouterr().out)
    assert configuration.load(tmp_path / "example.yaml") == configuration.Config()


def test_config_show_applies_both_forms_of_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "--engine.rows", "8", "--engine.slots=1e1", "--watch", "[{index: 3}]"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    loaded = configuration.load(tmp_path / "shown.yaml")
    assert (loaded.engine.rows, loaded.engine.slots, loaded.watch[0].index) == (8, 10, 3)


def test_a_chat_has_defaults_of_its_own() -> None:
    def sampling(*arguments: str) -> dict[str, object]:
        return generate.sampling_of(generate.parser().parse_args(["x", *arguments]))

    assert sampling() == {}
    assert sampling("--chat") == generate.CHAT
    assert sampling("--chat", "--temperature", "0", "--seed", "1") == {**generate.CHAT, "temperature": 0.0, "seed": 1}


@pytest.mark.parametrize(
    ("arguments", "port"),
    [([], None), (["--model", "small"], 8000), (["--model", "small", "--listen.http_port", "9"], 9),
     (["--model", "small", "--listen.http_port", "null"], None)],
)  # fmt: skip
def test_a_first_look_has_the_http_endpoint(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], port: int | None
) -> None:
    served: list[configuration.Config] = []
    monkeypatch.setattr(serve, "run", served.append)
    serve.main(arguments)
    assert [config.listen.http_port for config in served] == [port]
