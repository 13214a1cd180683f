"""Resolving names of checkpoints: local paths, repositories, the cache, and SAELens' table.

Nothing leaves the machine: repositories are in a cache folder in huggingface_hub's layout, or on a local server.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rudder.sae_models.formats import gemma_scope, hub, qwen_scope
from rudder.sae_models.formats.hub import Location, NotFound
from rudder.sae_models.formats.source import FormatError
from tests.unit.checkpoints import Draw, write_gemma_scope, write_qwen_scope

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_repository(cache: Path, name: str, files: dict[str, bytes], revision: str = "main") -> Path:
    """Write a repository into the cache, blobs and a snapshot of links to them; return the snapshot."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for number, (file, content) in enumerate(files.items()):
        blob, link = home / "blobs" / str(number), snapshot / file
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.fixture
def no_saelens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide an installed sae_lens package."""
    monkeypatch.setattr(hub, "saelens_table", lambda: None)


def saelens(home: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    """Install a sae_lens package with that table, which raises if it is imported."""
    (home / "sae_lens").mkdir()
    (home / "sae_lens/__init__.py").write_text("raise RuntimeError('imported')")
    (home / "sae_lens/pretrained_saes.yaml").write_text(table)
    monkeypatch.syspath_prepend(home)
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)


TABLE = """
gemma-scope-2b-pt-res:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: google/gemma-scope-2b-pt-res
  saes:
  - id: layer_20/width_16k/average_l0_71
    path: layer_20/width_16k/average_l0_71
    l0: 71
scaled:
  model: m
  repo_id: a/scaled
  saes:
  - id: blocks.3.hook_resid_pre
    path: 3
    norm_scaling_factor: 1.5
gpt2-small-res-jb:
  config_overrides:
    model_from_pretrained_kwargs:
      center_writing_weights: true
  model: gpt2-small
  repo_id: jbloom/reformatted
  saes:
  - id: blocks.6.hook_resid_pre
    path: blocks.6.hook_resid_pre
    neuronpedia: gpt2-small/6-res-jb
  - id: blocks.7.hook_resid_pre
    path: blocks.7.hook_resid_pre
    config_overrides:
      context_size: 64
clt-as-per-layer:
  conversion_func: mntss_clt_layer_transcoder
  model: gemma-2-2b
  repo_id: mntss/clt
  saes:
  - id: layer_3
    path: 3
"""


def test_existing_path_resolves_to_itself(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "a.pt").touch()
    assert hub.resolve(str(tmp_path / "a.pt")) == tmp_path / "a.pt"


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("a/b", Location("a/b")),
        ("a/b@v1", Location("a/b", "v1")),
        ("a/b@refs/pr/1:x/y", Location("a/b", "refs/pr/1", "x/y")),
        ("a/b:layers.3/", Location("a/b", None, "layers.3")),
        ("a/b:x.pt", Location("a/b", None, "x.pt")),
    ],
)
def test_parse_splits_repository_revision_and_subfolder(name: str, location: Location) -> None:
    assert hub.parse(name) == location


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "a b/c!", "-a/b", "/b", "a/", "", "a/b:../c", "a/b:x/../../c", "a/b:/etc"]
)
@pytest.mark.usefixtures("no_saelens")
def test_parse_refuses_other_forms_with_an_explanation(name: str) -> None:
    with pytest.raises(NotFound, match=r"organisation/repository\[@revision\]\[:subfolder\].*install sae-lens"):
        hub.parse(name)


@pytest.mark.usefixtures("no_saelens")
def test_resolve_finds_folders_and_files_in_the_cache_offline(tmp_path: Path) -> None:
    checkpoint = write_gemma_scope(tmp_path / "checkpoint", Draw())
    within = "layer_20/width_16k/average_l0_71"
    files = {
        f"{within}/params.npz": checkpoint.file.read_bytes(),
        "README.md": b"",
        "layer_1/width_16k/a/params.npz": b"",
    }
    snapshot = write_repository(tmp_path, "google/gemma-scope-2b-pt-res", files)
    name = f"google/gemma-scope-2b-pt-res:{within}"
    for path in (hub.resolve(name, tmp_path, offline=True), hub.resolve(f"{name}/params.npz", tmp_path, offline=True)):
        assert path.is_relative_to(snapshot / within)
        assert gemma_scope.FORMAT.read(path)[1].sites == ("layers.20.resid_post",)


@pytest.mark.usefixtures("no_saelens")
def test_qwen_scope_reads_k_through_the_cache(tmp_path: Path) -> None:
    checkpoint = write_qwen_scope(tmp_path / "checkpoint", Draw())
    repository = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    write_repository(tmp_path, repository, {"layer3.sae.pt": checkpoint.file.read_bytes(), "layer4.sae.pt": b""}, "v1")
    path = hub.resolve(f"{repository}@v1:layer3.sae.pt", tmp_path, offline=True)
    assert qwen_scope.FORMAT.read(path)[1].l0 == 5


@pytest.mark.usefixtures("no_saelens")
def test_resolve_offline_names_what_is_not_in_the_cache(tmp_path: Path) -> None:
    write_repository(tmp_path, "a/b", {"x/sae.safetensors": b"", "cfg.json": b"{}"})
    with pytest.raises(NotFound, match="a/c: not in the cache, and cannot be reached: offline"):
        hub.resolve("a/c", tmp_path, offline=True)
    with pytest.raises(NotFound, match="a/b: not in the cache, and cannot be reached: offline"):
        hub.resolve("a/b@v2", tmp_path, offline=True)
    with pytest.raises(FormatError, match=r"a/b: no weights in its root; there are some in \['x'\]"):
        hub.resolve("a/b", tmp_path, offline=True)
    with pytest.raises(NotFound, match=r"a/b: no weights in y; there are some in \['x'\]"):
        hub.resolve("a/b:y", tmp_path, offline=True)


def test_select_files_returns_only_those_of_the_location() -> None:
    files = [
        "README.md",
        "config.yaml",
        "layer_0.safetensors",
        "layer_1.safetensors",
        "scope/hyperparams.json",
        "scope/checkpoints/final.safetensors",
        "scope/deeper/other.safetensors",
        "scope/optimizer.bin",
    ]
    assert hub.select_files(files, Location("a/b", within="layer_1.safetensors")) == [
        "layer_1.safetensors",
        "config.yaml",
    ]
    scope = ["scope/checkpoints/final.safetensors", "scope/hyperparams.json"]
    assert hub.select_files(files, Location("a/b", within="scope")) == scope
    assert hub.select_files(files, Location("a/b", within=scope[0])) == scope
    assert hub.select_files(files, Location("a/b")) == ["layer_0.safetensors", "layer_1.safetensors", "config.yaml"]
    across = [f"{part}_{layer}.safetensors" for part in ("W_enc", "W_dec") for layer in range(3)]
    assert hub.select_files([*across, "config.yaml"], Location("a/b", within="W_enc_1.safetensors")) == [
        "W_enc_1.safetensors",
        "W_dec_1.safetensors",
        "config.yaml",
    ]
    layers = [f"layer_{layer}.safetensors" for layer in range(28)]
    with pytest.raises(NotFound, match="a/b: 28 weights in its root, name one of them"):
        hub.select_files(layers, Location("a/b"))
    assert hub.select_files([*files, "scope/../../x.safetensors"], Location("a/b", within="scope")) == scope


def test_release_and_id_are_looked_up_in_the_table_of_saelens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path, monkeypatch, TABLE)
    within = "layer_20/width_16k/average_l0_71"
    write_repository(tmp_path, "google/gemma-scope-2b-pt-res", {f"{within}/params.npz": b""})
    path = hub.resolve(f"gemma-scope-2b-pt-res/{within}", tmp_path, offline=True)
    assert path.name == "average_l0_71"
    assert hub.release("scaled/blocks.3.hook_resid_pre") == hub.Release(Location("a/scaled", within="3"), 1.5)
    assert hub.release("a/b") is None
    across = hub.Release(Location("mntss/clt", within="W_enc_3.safetensors"), None)
    assert hub.release("clt-as-per-layer/layer_3") == across
    with pytest.raises(NotFound, match="release scaled has no 4; it has 1, such as blocks"):
        hub.release("scaled/4")
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    sixth, seventh = (hub.release(f"gpt2-small-res-jb/blocks.{layer}.hook_resid_pre") for layer in (6, 7))
    assert sixth is not None
    assert seventh is not None
    assert sixth.overrides == centred | {"neuronpedia_id": "gpt2-small/6-res-jb"}
    assert seventh.overrides == centred | {"context_size": 64}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that a download requests: one repository, one gated repository, no other."""

    files = {"x/params.npz": b"weights", "x/config.json": b"{}", "y/params.npz": b"not requested"}  # noqa: RUF012

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        """Send a complete response."""
        self.send_response(status)
        for name, value in (headers | {"Content_Length": str(len(content))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        """Serve a repository's list of files, or one of them."""
        path = self.path.partition("?")[0]
        _, resolved, file = path.partition("/resolve/main/")
        if resolved and file in self.files:
            etag = f'"{hashlib.sha1(self.files[file]).hexdigest()}"'
            self.answer(200, self.files[file], ETag=etag, X_Repo_Commit=COMMIT)
        elif path == "/api/models/a/b":
            listed = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "a/b", "sha": COMMIT, "siblings": listed}).encode())
        elif path.startswith("/api/models/a/b/revision/"):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif path == "/api/models/a/gated":
            self.answer(403, X_Error_Code="GatedRepo")
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Start a hub; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


RESOLVE = """
import json, sys
from pathlib import Path
from rudder.sae_models.formats import hub
for name in sys.argv[2:]:
    try:
        print(hub.resolve(name, Path(sys.argv[1])))
    except hub.NotFound as error:
        print(error)
"""


def test_download_fetches_only_the_files_of_its_location(tmp_path: Path, endpoint: str) -> None:
    names = ["a/b:x", "a/b@v9:x", "a/gated", "a/none", "a/b:z"]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", RESOLVE, str(tmp_path), *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    output = run.stdout.splitlines()
    folder = tmp_path / "models--a--b/snapshots" / COMMIT / "x"
    assert output[0] == str(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "params.npz": b"weights",
        "config.json": b"{}",
    }
    assert not (folder.parent / "y").exists()
    assert "a/b has no revision v9" in output[1]
    assert "access to a/gated must be requested" in output[2]
    assert "no repository a/none that can be seen" in output[3]
    assert "no weights in z; there are some in ['x', 'y']" in output[4]
    assert hub.resolve("a/b:x", tmp_path, offline=True) == folder
