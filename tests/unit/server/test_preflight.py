"""Wrong configuration is found before anything slow begins: one line that names the field."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from rudder.sae_models import PRETRAINED, settings
from rudder.sae_models.errors import UserError
from rudder.server import config as configuration
from rudder.server import preflight
from rudder.server.config import Config, ConfigError, Listen
from rudder.server.engine.sockets import MAX_PATH_BYTES, NAME_BYTES, socket_folder
from rudder.server.process import free_port, require_free

LAYER_2 = str(PRETRAINED / "textbook-lm-layers.2")
NONSENSE = (
    "", " ", "null", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "99999999999999999999", "1.5", "[]", "{}", "[[]]",
    "[{}]", "[null]", "true", "\x00", "[\x00]", "é💥", "é" * 300, "/nowhere", "a/b", "../..", "layers.99.resid_post",
)  # fmt: skip


def problem_of(**fields: str) -> str:
    """Return the message of the error of this configuration."""
    with pytest.raises(UserError) as caught:
        preflight.check(configuration.load(overrides=fields))
    return str(caught.value)


def test_a_watched_feature_names_its_bundle_where_several_are_served(tmp_path: Path) -> None:
    manifest = (Path(LAYER_2) / "manifest.json").read_text()
    second = shutil.copytree(LAYER_2, tmp_path / "second", copy_function=os.symlink)
    (second / "manifest.json").unlink()
    (second / "manifest.json").write_text(manifest.replace("layers.2", "layers.4"))
    both = {"engine.bundles": json.dumps([LAYER_2, str(second)])}
    problem = problem_of(watch="[{index: 1}]", **both)
    assert problem == "watch[0].bundle: name one of textbook-lm-layers.2, textbook-lm-layers.4"
    watch = "[{index: 1, bundle: textbook-lm-layers.4}]"
    assert preflight.check(configuration.load(overrides={"watch": watch, **both}))


def test_shipped_configuration_passes() -> None:
    assert preflight.check(Config()) == Config()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"watch": "[{index: 1, bundle: x}]"},
            "watch[0].bundle: no bundle 'x' is served; served: textbook-lm-layers.2",
        ),
        ({"watch": "[{index: 4096}]"}, "watch[0].index: textbook-lm-layers.2 has latents 0 to 4095, not 4096"),
        ({"watch": "[{index: 1, site: layers.3.mlp_out}]"}, "watch[0].site: 'layers.3.mlp_out' is not a site of"),
        (
            {"watch": "[{index: 1}]", "engine.bundles": "[]", "engine.sites": "layers.1.mlp_out"},
            "watch[0].bundle: no bundle is served",
        ),
        ({"engine.bundles": "[]"}, "engine.bundles: is empty, and so is engine.sites"),
        ({"engine.bundles": json.dumps([LAYER_2, LAYER_2])}, "engine.bundles: two bundles have the same name"),
        ({"engine.bundles": "[nowhere]"}, "engine.bundles: 'nowhere' is not a folder"),
        ({"engine.sites": "[layers.6.mlp_out]"}, "engine.sites: layers.6.mlp_out: the model has 6 layers"),
        ({"engine.sites": "[layer.1]"}, "engine.sites: 'layer.1' is not layers.<L>."),
        ({"engine.sequence_sites": "[layers.1.mlp_out]"}, "engine.sequence_sites: 'layers.1.mlp_out' is not one of"),
        ({"engine.model": "no-such/model"}, "engine.model: 'no-such/model' is neither a folder nor in the local"),
        ({"engine.model": str(PRETRAINED)}, "engine.model: no config.json in "),
        ({"engine.revision": "main"}, "engine.revision: "),
        ({"engine.model": "no-such/model", "engine.revision": "main"}, "engine.model: 'no-such/model' is neither"),
        ({"engine.node_rank": "1"}, "engine.node_rank: is 1, of 1 machines from 0"),
        ({"engine.nodes": "2"}, "engine.tensor_parallel_size: 1 devices cannot be spread over 2 machines evenly"),
        ({"programs.folder": "nowhere"}, "programs.folder: 'nowhere' is not a folder"),
        ({"policies.folder": "nowhere"}, "policies.folder: 'nowhere' is not a folder"),
        ({"policies.folder": str(PRETRAINED / "programs")}, f"{PRETRAINED}/programs/"),
    ],
)
def test_field_at_fault_is_named(fields: dict[str, str], problem: str) -> None:
    assert problem_of(**fields).startswith(problem)


@pytest.mark.parametrize("field", [field.name for field in settings.fields(Config)])
def test_nonsense_is_one_line_or_nothing(field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a field holds, the outcome is a configuration or an error of the user."""
    monkeypatch.chdir(tmp_path)
    refused = 0
    for text in NONSENSE:
        try:
            config = configuration.load(overrides={"listen.port": "0", "listen.metrics_port": "0", field: text})
            preflight.check(config)
            if field.startswith("listen"):
                require_free(config.listen)
        except UserError:
            refused += 1
    # vLLM knows the methods of quantisation. A file may be made by the server, or be there once it starts.
    assert refused > 1 or field in ("engine.quantization", "policies.state", "policies.certificate_key")


def test_each_check_ends_before_vllm_would_be_imported() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rudder.server", "serve"]
    for flags in (["--watch=[{index: 1, bundle: x}]"], ["--listen.host=no such host"], ["--engine.bundles=[]"]):
        result = subprocess.run(
            [*command, "--listen.port=0", "--listen.metrics_port=0", *flags],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == 2
        lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
        assert len(lines) == 1
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert not {"torch", "vllm", "transformers"} & imported


def hub_cache(folder: Path, *files: str) -> Path:
    """Write a Hugging Face cache with one repository, whose files link to blobs; return the snapshot."""
    repository = folder / "hub" / "models--org--small-lm"
    snapshot = repository / "snapshots" / ("0" * 40)
    for part in (repository / "refs", repository / "blobs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name in files:
        (repository / "blobs" / name).write_bytes((PRETRAINED / "textbook-lm" / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return snapshot


def test_hub_name_is_its_local_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = next((PRETRAINED / "textbook-lm").glob("*.safetensors")).name
    snapshot = hub_cache(tmp_path, "config.json", weights)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in ({}, {"engine.revision": "main"}):
        checked = preflight.check(configuration.load(overrides={"engine.model": "org/small-lm"} | revision))
        assert checked.engine.model == str(snapshot)
        # `serve` checks before it imports vLLM, and the start of the engine once more.
        assert preflight.check(checked) == checked
    from rudder.sae_models.bundle.bundle import model_sha256
    from rudder.server.engine.adapter import model_name

    assert model_sha256(snapshot) == model_sha256(PRETRAINED / "textbook-lm")
    assert model_name(snapshot) == "org/small-lm"
    assert model_name(PRETRAINED / "textbook-lm") == "textbook-lm"


def test_snapshot_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path, "config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert problem_of(**{"engine.model": "org/small-lm"}).startswith("engine.model: no safetensors file in ")
    random_weights = {"engine.model": "org/small-lm", "engine.load_format": "dummy"}
    assert preflight.check(configuration.load(overrides=random_weights)).engine.load_format == "dummy"


def test_without_the_shipped_model_the_line_tells_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel of rudder-server alone has no rudder-pretrained."""
    absent = tmp_path / "pretrained"
    monkeypatch.setattr(preflight, "PRETRAINED", absent)
    own = {"engine.model": str(PRETRAINED / "textbook-lm"), "engine.bundles": json.dumps([LAYER_2])}
    defaults = {
        "engine.model": str(absent / "textbook-lm"),
        "engine.bundles": json.dumps([str(absent / "textbook-lm-layers.2")]),
        "programs.folder": str(absent / "programs"),
    }
    for field in defaults:
        problem = problem_of(**{**own, "programs.folder": "null", field: defaults[field]})
        assert problem.startswith(f"{field}: ")
        assert problem.endswith("install rudder-server[demo], or set engine.model, engine.bundles and programs.folder")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"name": "x"}', "\x00", '{"name":1,"latents":"a","model":[]}'])
def test_manifest_that_cannot_be_read(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    assert problem_of(**{"engine.bundles": json.dumps([str(tmp_path)])}).startswith("engine.bundles: ")


def test_bundle_for_another_width_is_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = json.loads((Path(LAYER_2) / "manifest.json").read_bytes())
    fields["model"]["hidden_size"] = 7
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    problem = problem_of(**{"engine.bundles": json.dumps([str(tmp_path)])})
    assert "fits a hidden size of 7, the model has 192" in problem


@pytest.mark.parametrize("config", [{"n_layer": 2}, {"text_config": {"num_hidden_layers": 2}}])
def test_layers_are_counted_in_every_form_of_config(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = {"engine.model": str(tmp_path), "engine.load_format": "dummy", "engine.bundles": "[]"}
    assert "the model has 2 layers" in problem_of(**model, **{"engine.sites": "[layers.2.mlp_out]"})


@pytest.mark.parametrize("host", ["::", "::1", "127.0.0.1", "localhost", "0.0.0.0"])
def test_every_kind_of_host_can_be_listened_on(host: str) -> None:
    listen = Listen(host=host, port=free_port(), metrics_port=0)
    require_free(listen)
    address = listen.address(7)
    assert address == (f"[{host}]:7" if ":" in host else f"{host}:7")


@pytest.mark.parametrize("host", ["no such host", "é" * 70, "a\x00b", "[::]", "::g", "1.2.3.4.5"])
def test_host_that_is_none_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^listen\.host: "):
        require_free(Listen(host=host, port=0, metrics_port=0))


def test_ports_must_differ_and_be_free() -> None:
    with pytest.raises(ConfigError, match=r"^listen\.metrics_port: 5 is listen\.port too"):
        require_free(Listen(port=5, metrics_port=5))
    for port, metrics_port in ((5, 0), (0, 5)):
        with pytest.raises(ConfigError, match=r"^listen\.health_port: 5 is listen\.(metrics_)?port too"):
            require_free(Listen(port=port, metrics_port=metrics_port, health_port=5))
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^listen\.health_port: cannot listen on \[::1\]:{port}: "):
            require_free(Listen(host="::1", port=0, metrics_port=0, health_port=port))
        with pytest.raises(ConfigError, match=rf"^listen\.metrics_port: cannot listen on \[::1\]:{port}: "):
            require_free(Listen(host="::1", port=0, metrics_port=port))


@pytest.mark.parametrize("bytes_", [10, 67, 68, 107, 108, 200])
def test_sockets_have_room_whatever_the_folder_of_temporary_files(
    bytes_: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path
    while len(os.fsencode(folder)) < bytes_:
        folder /= "x" * min(50, max(1, bytes_ - len(os.fsencode(folder)) - 1))
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with tempfile.TemporaryDirectory(prefix="rudder-", dir=socket_folder()) as sockets:
        address = f"{sockets}/telemetry"
        assert len(os.fsencode(address)) <= MAX_PATH_BYTES
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(address)
        fits = len(os.fsencode(folder)) + NAME_BYTES <= MAX_PATH_BYTES
        assert Path(sockets).is_relative_to(folder) == fits


def test_check_is_fast() -> None:
    begin = time.monotonic()
    preflight.check(Config())
    assert time.monotonic() - begin < 1
