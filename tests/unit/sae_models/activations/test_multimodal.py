"""A model of text and images is read at the layers of its text part, also where both parts have the same depth."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma3Config

from rudder.sae_models.activations import harvest, hooks
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.bundle.bundle import Source
from rudder.sae_models.formats.source import Declaration, Loaded
from rudder.sae_models.importing import importer
from rudder.sae_models.importing.importer import ImportRequest
from tests.unit import tiny
from tests.unit.sae_models.importing.test_importing import random_sae


def save_gemma3(folder: Path, text_layers: int = 3, vision_layers: int = 3) -> Any:
    """Save a random Gemma 3 of text and images, with the shipped tokenizer; return the model."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 8192, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": text_layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": vision_layers, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=8191)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.TEXTBOOK_LM / name, folder / name)
    return model


@pytest.mark.parametrize(("text", "vision"), [(3, 3), (3, 2), (2, 3)])
def test_sites_are_those_of_the_text_model(tmp_path: Path, text: int, vision: int) -> None:
    model = save_gemma3(tmp_path, text, vision)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert harvest.is_causal_lm(AutoConfig.from_pretrained(tmp_path))
    sites = [parse_site("layers.0.resid_post"), parse_site("layers.1.resid_pre")]
    trunk = harvest.load_trunk(tmp_path, *sites)
    assert type(hooks.layers_of(trunk)[0]).__name__ == "Gemma3DecoderLayer"
    assert len(hooks.layers_of(trunk)) == 2
    ids = torch.randint(2, 8000, (2, 6), generator=torch.Generator().manual_seed(1))
    ((first, second),) = harvest.activations(trunk, sites, [{"input_ids": ids}])
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(first, second)
    assert torch.allclose(first, hidden[1], atol=1e-5)


def test_import_with_a_corpus_measures_and_applies_the_logit_lens(tmp_path: Path) -> None:
    save_gemma3(tmp_path / "model")
    corpus = tiny.save_corpus(tmp_path / "corpus.jsonl", 20)
    checkpoint = Loaded("toy", "", random_sae(24, 16), Declaration("relu", ("layers.1.resid_post",)))
    request = ImportRequest(tmp_path / "model", tmp_path / "out", corpus=corpus, tokens=500, accept=True)
    imported = importer.import_sae(checkpoint, Source("toy", "x"), request).bundle
    assert imported.measured
    active = int(imported.statistics.frequency.argmax())
    assert imported.catalogue.get(active).promoted
