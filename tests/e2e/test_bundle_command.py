"""`rudder bundle`: import makes a bundle of a published checkpoint, check reports by exit status if it is valid."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.formats import saelens
from tests.e2e import published
from tests.e2e.published import DECLARED, MODEL, SHIPPED, SITE

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, labels, and the shipped SAE as SAELens checkpoints: complete, and without its thresholds."""
    folder = tmp_path_factory.mktemp("bundle command")
    shipped = published.write(folder)
    label = {"modelId": "textbook-lm", "layer": "2-res", "index": "3", "description": "a label from elsewhere"}
    (folder / "labels.jsonl").write_text(json.dumps(label))
    none = torch.full_like(shipped.sae.threshold, 1e-6)
    saelens.write(folder / "no threshold", replace(shipped.sae, threshold=none), DECLARED)
    return folder


def rudder(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run `rudder bundle` in a subprocess."""
    command = [sys.executable, "-m", "rudder.server", "bundle", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_import_of_a_checkpoint_gives_a_valid_bundle(folder: Path) -> None:
    text = ("--corpus", folder / "corpus.jsonl", "--tokens", "3000", "--labels", folder / "labels.jsonl")
    done = rudder("import", folder / "whole", "--model", MODEL, "--out", folder / "imported", *text)
    assert done.returncode == 0, done.stderr
    assert "1 labels taken of 1 records" in done.stdout
    assert "catalogue:" in done.stderr, "no progress was shown"
    imported = bundles.load(folder / "imported")
    assert imported.manifest.sites == (SITE,)
    assert imported.manifest.source is not None
    assert imported.manifest.source.where == "whole"
    assert imported.catalogue.get(3).summary.label == "a label from elsewhere"
    assert torch.allclose(imported.sae.encoder, bundles.load(SHIPPED).sae.encoder)
    done = rudder("check", folder / "imported", "--model", MODEL, "--corpus", folder / "corpus.jsonl", "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["holds"]
    assert report["verdict"]["stands"]


def test_shipped_bundle_is_valid() -> None:
    done = rudder("check", SHIPPED)
    assert done.returncode == 0, done.stdout
    assert "conformance" in done.stdout


def test_check_names_missing_thresholds(folder: Path) -> None:
    done = rudder("import", folder / "no threshold", "--model", MODEL, "--out", folder / "unmeasured")
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout
    manifest = folder / "unmeasured" / bundles.MANIFEST
    content = json.loads(manifest.read_text())
    content["source"]["l0"] = 31.9
    manifest.write_text(json.dumps(content))
    done = rudder("check", folder / "unmeasured", "--model", MODEL, "--corpus", folder / "corpus.jsonl")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "give the latents their thresholds" in done.stdout


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (("check", "nowhere"), 2, "bundle: nowhere is not a folder"),
        (("check", SHIPPED, "--corpus", "x"), 2, "--corpus: needs --model"),
        (("check", SHIPPED, "--model", "nowhere"), 2, "model: no config.json in nowhere"),
        (("check", MODEL), 1, "manifest.json: not a file"),
        (("import", MODEL, "--model", MODEL, "--out", "made"), 2, "the format must be one"),
    ],
)
def test_exit_status_separates_invalid_from_unreadable(words: tuple[str | Path, ...], status: int, reason: str) -> None:
    done = rudder(*words)
    assert done.returncode == status, done.stdout + done.stderr
    assert reason in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
