"""Loading detects the format; if it is ambiguous or unknown, the error lists the files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rudder.sae_models.formats.load import FORMATS, load
from rudder.sae_models.formats.source import FormatError

D, F = 4, 6


def saelens(path: Path, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": D, "d_sae": F} | config))
    tensors = {"W_enc": torch.ones(D, F), "b_enc": torch.ones(F), "W_dec": torch.ones(F, D), "b_dec": torch.ones(D)}
    save_file(tensors, path / "sae_weights.safetensors")
    return path


def test_load_returns_the_format_and_the_reason(tmp_path: Path) -> None:
    loaded = load(saelens(tmp_path))
    assert (loaded.format, loaded.why) == ("saelens", "cfg.json beside sae_weights.safetensors")
    assert loaded.sae.latents == F


def test_load_accepts_the_path_of_the_weights(tmp_path: Path) -> None:
    assert load(saelens(tmp_path) / "sae_weights.safetensors").format == "saelens"


def test_format_names_are_unique() -> None:
    assert len({reader.name for reader in FORMATS}) == len(FORMATS)


def test_load_refuses_two_formats_in_one_folder_by_name(tmp_path: Path) -> None:
    saelens(tmp_path)
    save_file({"b_dec": torch.ones(D)}, tmp_path / "sae.safetensors")
    with pytest.raises(FormatError, match=r"saelens: cfg\.json beside .*; sparsify: cfg\.json beside sae\.safetensors"):
        load(tmp_path)


def test_load_refuses_an_unknown_folder_and_lists_it(tmp_path: Path) -> None:
    for name in ("layers.0", "layers.1"):
        saelens(tmp_path / name)
    (tmp_path / "README.md").write_text("")
    with pytest.raises(FormatError, match=r"none that is known; seen: README\.md, layers\.0/, layers\.1/$"):
        load(tmp_path)


def test_load_lists_a_limited_number_of_names(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}").touch()
    with pytest.raises(FormatError, match=r"18, 19 and 10 more$"):
        load(tmp_path)


def test_load_refuses_empty_folders_other_files_and_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="seen: nothing"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("abc")
    with pytest.raises(FormatError, match=r"seen: the file notes\.txt, 3 bytes"):
        load(tmp_path / "notes.txt")
    with pytest.raises(FormatError, match="is not there"):
        load(tmp_path / "missing")


def test_load_refuses_architectures_that_are_not_per_token(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="temporal cannot be served per token"):
        load(saelens(tmp_path, architecture="temporal"))


def test_load_refuses_a_truncated_file_by_name(tmp_path: Path) -> None:
    file = saelens(tmp_path) / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors"):
        load(tmp_path)
