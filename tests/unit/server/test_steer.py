"""`rudder steer`: concepts are added to those of the same bundle that were calibrated alike, and shown."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rudder.sae_models import concepts
from rudder.sae_models.analysis.sampling import Voice
from rudder.sae_models.analysis.steering import Settings
from rudder.sae_models.concepts import Concepts
from rudder.sae_models.errors import UserError
from rudder.server.cli import main
from rudder.server.cli.steer import earlier_content
from tests.unit.programs import SITE
from tests.unit.reference import BUNDLE
from tests.unit.topics import DULL, STARS, concepts_of

MATERIAL: Any = SimpleNamespace(
    voice=Voice(None, None),
    bundle=SimpleNamespace(
        manifest=SimpleNamespace(
            name=BUNDLE, site=SITE, model=SimpleNamespace(sha256="m"), files={"sae.safetensors": "ab", "other": "cd"},
            training=SimpleNamespace(credit="the authors of the corpus"),
        )
    ),
)  # fmt: skip


def earlier(folder: Path, prompts: int = 16, **changes: Any) -> Concepts:
    args = argparse.Namespace(bundle=folder, prompts=prompts, credit="")
    return earlier_content(args, MATERIAL, Settings(seeds=2, **changes))


def test_without_a_file_there_are_no_concepts_yet(tmp_path: Path) -> None:
    content = earlier(tmp_path)
    assert content == concepts_of(credit="the authors of the corpus")


def test_concepts_that_were_calibrated_alike_stay(tmp_path: Path) -> None:
    concepts.write(tmp_path / concepts.FILE, concepts_of(STARS))
    assert earlier(tmp_path) == concepts_of(STARS)


def test_concepts_of_another_calibration_or_model_are_not_mixed(tmp_path: Path) -> None:
    concepts.write(tmp_path / concepts.FILE, concepts_of(STARS))
    with pytest.raises(UserError, match="were calibrated otherwise"):
        earlier(tmp_path, prompts=32)
    with pytest.raises(UserError, match="were calibrated otherwise"):
        earlier(tmp_path, random_directions=40)
    concepts.write(tmp_path / concepts.FILE, concepts_of(STARS, model="n"))
    with pytest.raises(UserError, match="another model or SAE"):
        earlier(tmp_path)


def test_concepts_are_shown_with_their_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concepts.write(tmp_path / concepts.FILE, concepts_of(STARS, DULL))
    assert main(["steer", "show", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "||x||" in line]
    assert ["inert" in row for row in rows] == [False, False, True]
    assert "0.600" in rows[0]
