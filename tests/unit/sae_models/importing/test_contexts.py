"""An import is measured on the contexts that the SAE was trained on, and the manifest says which."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import samples
from rudder.sae_models.activations.corpus import ContextRule, Windows
from rudder.sae_models.bundle import bundle
from rudder.sae_models.bundle import manifest as manifests
from rudder.sae_models.bundle.bundle import BundleError
from rudder.sae_models.bundle.manifest import Context
from rudder.sae_models.formats.source import Declaration
from rudder.sae_models.importing import check, contexts, importer
from rudder.sae_models.importing.importer import ImportRequest
from tests.unit import tiny
from tests.unit.sae_models.importing.test_importing import loaded, random_sae

MODEL = PRETRAINED / "textbook-lm"


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ({}, Context()),
        ({"context_size": 128, "prepend_bos": True}, Context(128, True)),
        ({"prepend_bos": False, "exclude_special_tokens": False}, Context(None, False)),
        ({"exclude_special_tokens": [5, 2, 5]}, Context(excluded_tokens=(2, 5))),
        ({"exclude_special_tokens": True}, Context(excluded_tokens=(0, 1))),
        ({"seqpos_slice": [5, None]}, Context(excluded_positions=(0, 1, 2, 3, 4))),
        ({"context_size": 6, "seqpos_slice": [1, -1, 2]}, Context(6, excluded_positions=(0, 2, 4, 5))),
        ({"seqpos_slice": [None]}, Context()),
    ],
)
def test_context_follows_what_the_source_declares(notes: dict[str, Any], expected: Context) -> None:
    assert contexts.declared_context(Declaration("relu", notes=notes), MODEL) == expected


@pytest.mark.parametrize(
    "notes",
    [
        {"context_size": 0},
        {"context_size": "128"},
        {"prepend_bos": "yes"},
        {"exclude_special_tokens": "all"},
        {"exclude_special_tokens": [-1]},
        {"seqpos_slice": [0, -1]},
        {"seqpos_slice": "5"},
        {"context_size": 4, "seqpos_slice": [0, 4, 0]},
    ],
)
def test_notes_that_cannot_be_meant_are_refused_by_name(notes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=f"^{list(notes)[-1]}: "):
        contexts.declared_context(Declaration("relu", notes=notes), MODEL)


def test_import_and_check_measure_with_the_context_of_the_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ContextRule]] = []
    original = samples.load_text_sample

    def spy(*args: Any) -> Any:
        seen.append(args[4:])
        sample = original(*args)
        assert isinstance(sample.windows, Windows)
        assert sample.windows.tokens.shape[1] == 24
        assert not bool((sample.windows.tokens[:, 0] == sample.tokenizer.bos_token_id).any())
        assert not bool(sample.windows.counted[:, :3].any())
        return sample

    monkeypatch.setattr(samples, "load_text_sample", spy)
    notes = {"context_size": 24, "prepend_bos": False, "seqpos_slice": [3, None]}
    corpus = tiny.save_corpus(tmp_path / "corpus.jsonl")
    request = ImportRequest(MODEL, tmp_path / "toy", corpus=corpus, tokens=1000, accept=True)
    result = importer.import_sae(loaded(random_sae(), notes=notes), bundle.Source("toy", "x"), request)
    manifest = result.bundle.manifest
    assert manifest.context == Context(24, False, (0, 1, 2))
    assert manifest.training.outlier_share == pytest.approx(0, abs=0.01)
    check.check_bundle(tmp_path / "toy", MODEL, corpus)
    assert seen == [(24, ContextRule(False, (0, 1, 2)))] * 2


def test_manifest_without_a_context_is_read_and_an_invalid_one_is_refused() -> None:
    raw = json.loads((PRETRAINED / "textbook-lm-layers.2" / "manifest.json").read_bytes())
    raw.pop("context", None)
    assert manifests.parse(json.dumps(raw).encode()).context == Context()
    for context, field in (
        ({"size": 1}, "size"),
        ({"excluded_positions": [2, 1]}, "excluded_positions"),
        ({"excluded_positions": [-1]}, "excluded_positions"),
        ({"excluded_tokens": [3, 3]}, "excluded_tokens"),
    ):
        with pytest.raises(BundleError, match=rf"^context\.{field}: "):
            manifests.parse(json.dumps(raw | {"context": context}).encode())


def test_window_is_no_longer_than_the_context_of_the_model() -> None:
    limit = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    assert contexts.windows_of(Context(1 << 20), MODEL)[0] == limit
    assert contexts.windows_of(Context(), MODEL)[0] == min(256, limit)
    assert torch.tensor(contexts.windows_of(Context(17), MODEL)[0]) == 17
