"""All readers behind one door: an AdaptiveK folder is not taken for dictionary_learning's, and no fold overflows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rudder.sae_models.formats.load import FORMATS, load
from rudder.sae_models.formats.source import FormatError

D, F = 4, 12


def test_every_reader_is_registered() -> None:
    folder = Path(__file__).parents[4] / "sae_models" / "formats"
    readers = {path.stem for path in folder.glob("*.py") if "\nFORMAT = Format(" in path.read_text()}
    assert {found.name for found in FORMATS} == readers


def test_an_adaptive_k_folder_is_one_format(tmp_path: Path) -> None:
    for name in ("ae.pt", "probe.pt", "config.json", "dynamic_config.json"):
        (tmp_path / name).write_text("{}")
    fitting = {found.name for found in FORMATS if found.recognise(tmp_path)}
    assert fitting == {"adaptive_k"}


def test_a_bias_that_overflows_when_the_pre_bias_is_folded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text(f'{{"d_in": {D}, "k": 2, "activation": "topk", "num_latents": {F}}}')
    tensors = {"encoder.weight": torch.full((F, D), 1e30), "encoder.bias": torch.zeros(F), "W_dec": torch.ones(F, D)}
    save_file(tensors | {"b_dec": torch.full((D,), 1e30)}, tmp_path / "sae.safetensors")
    with pytest.raises(FormatError, match="the bias has values that are not finite once the settings are folded in"):
        load(tmp_path)
