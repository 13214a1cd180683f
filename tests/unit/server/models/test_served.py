"""The models that the demo serves: the toy where the other cannot be had, in one line."""

import json
from pathlib import Path

import pytest

from rudder.sae_models import PRETRAINED
from rudder.server import config as configuration
from rudder.server.models import known, served
from rudder.server.models.package import DownloadError
from rudder.server.program.named import load_programs
from rudder_client.tour import STRENGTHS, TOPIC, UNLEARNING


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders with the names of two bundles, in a place of their own."""
    folders = [tmp_path / f"smollm2-135m-layers.{layer}" for layer in (9, 14)]
    for folder in (*folders, tmp_path / "programs" / "smollm2-135m-instruct"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(served, "PRETRAINED", tmp_path)
    return folders


def offline(name: str) -> Path:
    raise DownloadError(f"{name} is not downloaded, and the index cannot be reached")


def test_small_model_is_the_default_of_the_configuration() -> None:
    config = configuration.load(None, served.fields_of(served.SMALL, pytest.fail))
    assert config == configuration.Config()


def test_instruct_model_comes_with_all_of_its_bundles(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "get", lambda name: Path("/models") / name)
    config = configuration.load(None, served.fields_of(served.AUTO, pytest.fail))
    assert config.engine.model == "/models/smollm2-135m-instruct"
    assert config.engine.bundles == tuple(map(str, bundles))
    assert config.engine.enforce_eager


@pytest.mark.usefixtures("bundles")
def test_without_a_registry_the_small_model_is_served_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "get", offline)
    lines: list[str] = []
    fields = served.fields_of(served.AUTO, lines.append)
    assert fields == served.small_fields()
    assert lines == [
        "serving the small model instead: smollm2-135m-instruct is not downloaded, and the index cannot be reached"
    ]
    with pytest.raises(DownloadError):
        served.fields_of(served.INSTRUCT, pytest.fail)


def test_without_bundles_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "PRETRAINED", tmp_path)
    monkeypatch.setattr(known, "get", lambda _: pytest.fail("downloaded"))
    with pytest.raises(served.BundleMissing, match="no SAE bundle of smollm2-135m-instruct"):
        served.fields_of(served.INSTRUCT, pytest.fail)


def test_without_programs_the_demo_is_the_small_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-135m-layers.9").mkdir()
    monkeypatch.setattr(served, "PRETRAINED", tmp_path)
    monkeypatch.setattr(known, "get", lambda _: PRETRAINED / "textbook-lm")
    lines: list[str] = []
    assert served.fields_of(served.AUTO, lines.append) == served.small_fields()
    assert lines == ["serving the small model instead: no programs of smollm2-135m-instruct are installed"]
    assert configuration.load(None, served.fields_of(served.INSTRUCT, pytest.fail)).programs.folder is None


def test_paths_with_commas_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a,b" / "smollm2-135m-layers.9"
    folder.mkdir(parents=True)
    (folder.parent / "programs" / "smollm2-135m-instruct").mkdir(parents=True)
    monkeypatch.setattr(served, "PRETRAINED", folder.parent)
    monkeypatch.setattr(known, "get", lambda _: PRETRAINED)
    assert json.loads(served.instruct_fields()["engine.bundles"]) == [str(folder)]


def test_programs_of_the_tour_ship_and_are_of_the_shipped_bundles() -> None:
    programs = load_programs(served.instruct_programs())
    assert programs.keys() == {f"{how}-{TOPIC}{dose}" for how in ("more", "less") for dose in STRENGTHS} | {UNLEARNING}
    manifests = [json.loads((folder / "manifest.json").read_bytes()) for folder in served.instruct_bundles()]
    latents = {(manifest["sites"][0], manifest["name"]): manifest["latents"] for manifest in manifests}
    for program in programs.values():
        for site in program.sites:
            features = [edit.row.feature for edit in site.edits]
            assert features
            assert all(feature.index < latents[site.site, feature.bundle] for feature in features)


def test_program_that_forgets_does_not_say_erased() -> None:
    (program,) = [p for name, p in load_programs(served.instruct_programs()).items() if name == UNLEARNING]
    assert "out of reach through this server" in program.description
