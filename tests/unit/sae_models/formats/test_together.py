"""All readers together: each is registered, formats do not overlap, and overflow while folding is refused."""

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
    assert {reader.name for reader in FORMATS} == readers


def test_adaptive_k_folder_has_one_format(tmp_path: Path) -> None:
    for name in ("ae.pt", "probe.pt", "config.json", "dynamic_config.json"):
        (tmp_path / name).write_text("{}")
    fitting = {reader.name for reader in FORMATS if reader.recognise(tmp_path)}
    assert fitting == {"adaptive_k"}


def test_overflow_of_the_bias_while_folding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text(f'{{"d_in": {D}, "k": 2, "activation": "topk", "num_latents": {F}}}')
    tensors = {"encoder.weight": torch.full((F, D), 1e30), "encoder.bias": torch.zeros(F), "W_dec": torch.ones(F, D)}
    save_file(tensors | {"b_dec": torch.full((D,), 1e30)}, tmp_path / "sae.safetensors")
    with pytest.raises(FormatError, match="the bias has values that are not finite once the settings are folded in"):
        load(tmp_path)
