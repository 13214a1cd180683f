"""What the wheels contain: code alone, except for the one of the demo model."""

import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = {"rudder-server": ".", "rudder-client": "clients/python", "rudder-pretrained": "sae_models/pretrained"}
COPIED = ("server", "sae_models", "clients", "rudder", "pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
WEIGHTS = (".safetensors", ".sqlite")
PRETRAINED = "rudder/sae_models/pretrained/"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the wheels from a copy, where no build has left anything, and with empty files for the large ones."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in COPIED:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=LEFT_OUT, copy_function=copy_small)
        else:
            shutil.copyfile(REPOSITORY / name, source / name)
    folders = [source / folder for folder in FOLDERS.values()]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", built, *folders], check=True)
    return {name: next(built.glob(f"{name.replace('-', '_')}-*.whl")) for name in FOLDERS}


def copy_small(source: str, target: str) -> None:
    if source.endswith(WEIGHTS):
        Path(target).touch()
    else:
        shutil.copyfile(source, target)


def contents(wheel: Path) -> set[str]:
    """Return the paths of the wheel's files, its metadata left out."""
    return {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}


def sources(folder: str, *patterns: str) -> set[str]:
    """Return the files in a folder of the repository that match a pattern, leftovers of builds left out."""
    root = REPOSITORY / folder
    paths = [file.relative_to(root) for pattern in patterns for file in root.rglob(pattern) if file.is_file()]
    return {path.as_posix() for path in paths if path.parts[0] != "build" and not path.parts[0].endswith(".egg-info")}


def test_server_wheel_has_all_code_of_its_two_packages_and_nothing_else(wheels: dict[str, Path]) -> None:
    folders = ("server", "sae_models")
    patterns = ("*.py", "py.typed", "console/*")
    expected = {f"rudder/{folder}/{file}" for folder in folders for file in sources(folder, *patterns)}
    assert contents(wheels["rudder-server"]) == expected
    assert {"rudder/server/py.typed", "rudder/sae_models/py.typed", "rudder/server/console/app.js"} <= expected


def test_client_wheel_has_the_client_and_the_generated_code(wheels: dict[str, Path]) -> None:
    names = contents(wheels["rudder-client"])
    assert {name.rpartition("/")[0] for name in names} == {"rudder/v1", "rudder_client"}
    assert {"rudder/v1/py.typed", "rudder_client/py.typed"} <= names
    assert names == sources("clients/python", "*.py", "*.pyi", "py.typed")


def test_pretrained_wheel_has_the_model_the_bundles_and_the_programs(wheels: dict[str, Path]) -> None:
    data = sources("sae_models/pretrained", "*") - {"pyproject.toml", "LICENSE"}
    assert contents(wheels["rudder-pretrained"]) == {PRETRAINED + file for file in data}
    assert PRETRAINED + "textbook-lm/model.safetensors" in contents(wheels["rudder-pretrained"])
    assert PRETRAINED + "textbook-lm-layers.2/catalogue.sqlite.xz" in contents(wheels["rudder-pretrained"])
    for layer in (9, 14):
        assert PRETRAINED + f"smollm2-135m-layers.{layer}/manifest.json" in contents(wheels["rudder-pretrained"])
    for folder in ("", "smollm2-135m-instruct/"):
        assert PRETRAINED + f"programs/{folder}forget-microbiology.yaml" in contents(wheels["rudder-pretrained"])


def test_wheels_share_the_namespace_package(wheels: dict[str, Path]) -> None:
    files = [name for wheel in wheels.values() for name in contents(wheel)]
    assert len(files) == len(set(files))
    assert "rudder/__init__.py" not in files
    assert {name.split("/")[0] for name in files} == {"rudder", "rudder_client"}


@pytest.mark.parametrize("name", FOLDERS)
def test_metadata_names_the_license(wheels: dict[str, Path], name: str) -> None:
    with ZipFile(wheels[name]) as wheel:
        folder = wheels[name].name.removesuffix("-py3-none-any.whl") + ".dist-info"
        metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
        text = wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert metadata["License-Expression"].startswith("Apache-2.0")
    assert text == (REPOSITORY / "LICENSE").read_text()
    assert "The Rudder authors" in text
