"""Names of checkpoints: what is local, what a repository's name says, what the cache has, and SAELens' table.

Nothing leaves the machine: repositories lie in a cache folder as huggingface_hub lays them out, or on a server here.
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
from rudder.sae_models.formats.hub import NotFound, Place
from rudder.sae_models.formats.source import FormatError
from tests.unit.checkpoints import Draw, lay_gemma_scope, lay_qwen_scope

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay_repository(cache: Path, name: str, files: dict[str, bytes], revision: str = "main") -> Path:
    """A repository in the cache: blobs, and a snapshot of links to them; the snapshot."""
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
    """As where the package is not installed."""
    monkeypatch.setattr(hub, "saelens_table", lambda: None)


def saelens(home: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    """An installed package with that table, which must not be imported."""
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
clt-as-per-layer:
  conversion_func: mntss_clt_layer_transcoder
  model: gemma-2-2b
  repo_id: mntss/clt
  saes:
  - id: layer_3
    path: 3
"""


def test_a_path_that_is_there_is_itself(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "a.pt").touch()
    assert hub.resolve(str(tmp_path / "a.pt")) == tmp_path / "a.pt"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a/b", Place("a/b")),
        ("a/b@v1", Place("a/b", "v1")),
        ("a/b@refs/pr/1:x/y", Place("a/b", "refs/pr/1", "x/y")),
        ("a/b:layers.3/", Place("a/b", None, "layers.3")),
        ("a/b:x.pt", Place("a/b", None, "x.pt")),
    ],
)
def test_a_name_has_a_repository_a_revision_and_a_subfolder(name: str, place: Place) -> None:
    assert hub.parse(name) == place


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "a b/c!", "-a/b", "/b", "a/", "", "a/b:../c", "a/b:x/../../c", "a/b:/etc"]
)
@pytest.mark.usefixtures("no_saelens")
def test_names_of_another_form_are_refused_and_say_the_forms(name: str) -> None:
    with pytest.raises(NotFound, match=r"organisation/repository\[@revision\]\[:subfolder\].*install sae-lens"):
        hub.parse(name)


@pytest.mark.usefixtures("no_saelens")
def test_the_cache_serves_folders_and_files_offline(tmp_path: Path) -> None:
    laid = lay_gemma_scope(tmp_path / "laid", Draw())
    within = "layer_20/width_16k/average_l0_71"
    files = {f"{within}/params.npz": laid.file.read_bytes(), "README.md": b"", "layer_1/width_16k/a/params.npz": b""}
    snapshot = lay_repository(tmp_path, "google/gemma-scope-2b-pt-res", files)
    name = f"google/gemma-scope-2b-pt-res:{within}"
    for found in (hub.resolve(name, tmp_path, offline=True), hub.resolve(f"{name}/params.npz", tmp_path, offline=True)):
        assert found.is_relative_to(snapshot / within)
        assert gemma_scope.FORMAT.read(found)[1].sites == ("layers.20.resid_post",)


@pytest.mark.usefixtures("no_saelens")
def test_k_of_qwen_scope_is_found_through_the_cache(tmp_path: Path) -> None:
    laid = lay_qwen_scope(tmp_path / "laid", Draw())
    repository = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    lay_repository(tmp_path, repository, {"layer3.sae.pt": laid.file.read_bytes(), "layer4.sae.pt": b""}, "v1")
    found = hub.resolve(f"{repository}@v1:layer3.sae.pt", tmp_path, offline=True)
    assert qwen_scope.FORMAT.read(found)[1].l0 == 5


@pytest.mark.usefixtures("no_saelens")
def test_what_is_not_in_the_cache_offline_is_named(tmp_path: Path) -> None:
    lay_repository(tmp_path, "a/b", {"x/sae.safetensors": b"", "cfg.json": b"{}"})
    with pytest.raises(NotFound, match="a/c: not in the cache, and cannot be reached: offline"):
        hub.resolve("a/c", tmp_path, offline=True)
    with pytest.raises(NotFound, match="a/b: not in the cache, and cannot be reached: offline"):
        hub.resolve("a/b@v2", tmp_path, offline=True)
    with pytest.raises(FormatError, match=r"a/b: no weights in its root; there are some in \['x'\]"):
        hub.resolve("a/b", tmp_path, offline=True)
    with pytest.raises(NotFound, match=r"a/b: no weights in y; there are some in \['x'\]"):
        hub.resolve("a/b:y", tmp_path, offline=True)


def test_only_the_files_of_a_place_are_wanted() -> None:
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
    assert hub.wanted(files, Place("a/b", within="layer_1.safetensors")) == ["layer_1.safetensors", "config.yaml"]
    scope = ["scope/checkpoints/final.safetensors", "scope/hyperparams.json"]
    assert hub.wanted(files, Place("a/b", within="scope")) == scope
    assert hub.wanted(files, Place("a/b", within=scope[0])) == scope
    assert hub.wanted(files, Place("a/b")) == ["layer_0.safetensors", "layer_1.safetensors", "config.yaml"]
    across = [f"{part}_{layer}.safetensors" for part in ("W_enc", "W_dec") for layer in range(3)]
    assert hub.wanted([*across, "config.yaml"], Place("a/b", within="W_enc_1.safetensors")) == [
        "W_enc_1.safetensors",
        "W_dec_1.safetensors",
        "config.yaml",
    ]
    layers = [f"layer_{layer}.safetensors" for layer in range(28)]
    with pytest.raises(NotFound, match="a/b: 28 weights in its root, name one of them"):
        hub.wanted(layers, Place("a/b"))
    assert hub.wanted([*files, "scope/../../x.safetensors"], Place("a/b", within="scope")) == scope


def test_a_release_and_id_are_found_in_the_table_of_saelens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path, monkeypatch, TABLE)
    within = "layer_20/width_16k/average_l0_71"
    lay_repository(tmp_path, "google/gemma-scope-2b-pt-res", {f"{within}/params.npz": b""})
    found = hub.resolve(f"gemma-scope-2b-pt-res/{within}", tmp_path, offline=True)
    assert found.name == "average_l0_71"
    assert hub.release("scaled/blocks.3.hook_resid_pre") == hub.Release(Place("a/scaled", within="3"), 1.5)
    assert hub.release("a/b") is None
    across = hub.Release(Place("mntss/clt", within="W_enc_3.safetensors"), None)
    assert hub.release("clt-as-per-layer/layer_3") == across
    with pytest.raises(NotFound, match="release scaled has no 4; it has 1, such as blocks"):
        hub.release("scaled/4")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: one repository, one that is gated, no other."""

    files = {"x/params.npz": b"weights", "x/config.json": b"{}", "y/params.npz": b"not asked for"}  # noqa: RUF012

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        """A whole answer."""
        self.send_response(status)
        for name, value in (headers | {"Content_Length": str(len(content))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        """Of a repository's list of files, or of one."""
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
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A hub's address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ASK = """
import json, sys
from pathlib import Path
from sae_models.formats import hub
for name in sys.argv[2:]:
    try:
        print(hub.resolve(name, Path(sys.argv[1])))
    except hub.NotFound as error:
        print(error)
"""


def test_a_download_fetches_the_files_of_its_place_alone(tmp_path: Path, endpoint: str) -> None:
    names = ["a/b:x", "a/b@v9:x", "a/gated", "a/none", "a/b:z"]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", ASK, str(tmp_path), *names]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    folder = tmp_path / "models--a--b/snapshots" / COMMIT / "x"
    assert said[0] == str(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "params.npz": b"weights",
        "config.json": b"{}",
    }
    assert not (folder.parent / "y").exists()
    assert "a/b has no revision v9" in said[1]
    assert "access to a/gated must be asked for" in said[2]
    assert "no repository a/none that can be seen" in said[3]
    assert "no weights in z; there are some in ['x', 'y']" in said[4]
    assert hub.resolve("a/b:x", tmp_path, offline=True) == folder
