"""GGUF files of the Llama family: weights, configuration, folders, and files that are refused."""

import json
import stat
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rudder.sae_models.errors import UserError
from rudder.server.models import convert as converting
from rudder.server.models.convert import convert
from rudder.server.models.gguf_file import ModelFileError, read
from rudder.server.models.llama import config_of, llama3_factors, separate_rotary_halves
from tests.unit.disk import full_beyond
from tests.unit.gguf_files import Shape, TinyLlama, interleaved, tiny_llama

F32, F16, BF16, Q8_0, Q4_1 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1"))


def converted(model: TinyLlama, folder: Path) -> dict[str, torch.Tensor]:
    """Convert a model and return its weights."""
    convert(model.write(folder / "model.gguf"), folder / "out")
    return load_file(folder / "out" / "model.safetensors")


def expected(model: TinyLlama, name: str) -> torch.Tensor:
    """Return a weight as the file's type holds it, in bfloat16."""
    values = model.weights[name]
    if values.ndim > 1:
        values = gguf.quants.dequantize(gguf.quants.quantize(values, model.quantized), model.quantized)
    return torch.from_numpy(values).bfloat16()


def config_with(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a tiny model with changed metadata."""
    return config_of(read(tiny_llama(**changes).write(tmp_path / "model.gguf")))


@pytest.mark.parametrize("quantized", [F32, F16, BF16, Q8_0, Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(heads=2, groups=2, tied=False), Shape(heads=3, groups=1, size=32, width=96)], ids=str
)
def test_converted_weights_equal_the_source(quantized: GGMLQuantizationType, shape: Shape, tmp_path: Path) -> None:
    model = tiny_llama(shape)
    model.quantized = quantized
    weights = converted(model, tmp_path)
    assert weights.keys() == model.weights.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected(model, name)), name


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 16), st.integers(1, 5), st.integers(0, 99))
def test_rows_of_heads_are_put_back_in_order(heads: int, pairs: int, width: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((heads * 2 * pairs, width), np.float32)
    stored = torch.from_numpy(interleaved(weight, heads))
    assert torch.equal(separate_rotary_halves(stored, heads), torch.from_numpy(weight))
    # llama.cpp has the two rows that a rotary embedding turns beside one another.
    assert torch.equal(stored[0], torch.from_numpy(weight)[0])
    assert torch.equal(stored[1], torch.from_numpy(weight)[pairs])


def test_configuration_is_that_of_the_file(tmp_path: Path) -> None:
    converted(tiny_llama(), tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": 288, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_answers_end_at_every_end_that_the_file_names(tmp_path: Path) -> None:
    converted(tiny_llama(tokenizer__ggml__eot_token_id=0, tokenizer__ggml__eom_token_id=2), tmp_path)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_untied_output_is_a_weight_of_its_own(tmp_path: Path) -> None:
    model = tiny_llama(Shape(tied=False))
    assert torch.equal(converted(model, tmp_path)["lm_head.weight"], expected(model, "lm_head.weight"))
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_defaults_of_old_files(tmp_path: Path) -> None:
    shape = Shape(heads=2, groups=2)
    left_out = ("attention.head_count_kv", "attention.key_length", "rope.dimension_count", "rope.freq_base")
    changes: dict[str, Any] = {f"llama__{key.replace('.', '__')}": None for key in left_out}
    model = tiny_llama(shape, **changes)
    config = config_of(read(model.write(tmp_path / "model.gguf")))
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 16)
    assert config["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "changes",
    [
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
        {"llama__rope__scaling__factor": 4.0},
        {"llama__rope__scale_linear": 4.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_linear_rope_scaling(changes: dict[str, Any], tmp_path: Path) -> None:
    parameters = config_with(tmp_path, **changes)["rope_parameters"]
    assert parameters == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_rope_scaling_by_one_is_none(kind: str, tmp_path: Path) -> None:
    changes = {"llama__rope__scaling__type": kind, "llama__rope__scaling__factor": 1.0}
    assert config_with(tmp_path, **changes)["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_factors_become_its_scaling(factor: float, tmp_path: Path) -> None:
    model = tiny_llama(Shape(size=64))
    parameters = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters |= {"original_max_position_embeddings": 8192, "rope_theta": 50000.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 50000.0 ** (-torch.arange(0, 64, 2) / 64)
    model.extra["rope_freqs.weight"] = (plain / scaled).numpy()
    assert torch.allclose(plain / scaled, torch.tensor(llama3_factors(factor, 50000.0, 64)), rtol=1e-5)
    assert config_of(read(model.write(tmp_path / "model.gguf")))["rope_parameters"] == parameters
    assert "rope_freqs" not in "".join(converted(model, tmp_path))


def test_rope_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    model = tiny_llama()
    model.extra["rope_freqs.weight"] = np.ones(8, np.float32)
    assert config_of(read(model.write(tmp_path / "m.gguf")))["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"general__architecture": "qwen2"}, "the architecture is qwen2; only llama can be converted"),
        ({"general__architecture": "gemma3"}, "the architecture is gemma3"),
        ({"llama__expert_count": 8}, "llama.expert_count: 8 experts cannot be converted"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type: yarn cannot be converted"),
        ({"llama__logit_scale": 0.5}, "llama.logit_scale: a setting that cannot be converted"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is not the size of a head, 16"),
        ({"llama__attention__value_length": 8}, "llama.attention.value_length is not the size of a head, 16"),
        ({"llama__attention__head_count": [4, 2]}, r"llama.attention.head_count is '\[4, 2\]', not of type int"),
        ({"llama__attention__head_count_kv": 3}, "4 heads of 16 in 3 groups, width 32"),
        ({"llama__attention__head_count": 6}, "6 heads of 16 in 2 groups, width 32"),
        ({"llama__attention__key_length": 15}, "4 heads of 15 in 2 groups, width 32"),
        ({"llama__attention__head_count_kv": 0}, "num_key_value_heads is 0"),
        ({"llama__attention__head_count": 0}, "num_attention_heads is 0"),
        ({"llama__block_count": 3}, "the tensor blk.2.attn_norm.weight is missing"),
        ({"llama__block_count": 0xFFFFFFFF}, "the tensor blk.2.attn_norm.weight is missing"),
        ({"llama__block_count": 1}, "blk.1.attn_k.weight is no tensor of a Llama model"),
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__feed_forward_length": 63}, r"blk.0.ffn_gate.weight has the shape \[64, 32\], not \[63, 32\]"),
        ({"llama__rope__freq_base": float("nan")}, "llama.rope.freq_base is 'nan', not of type float"),
        ({"split__count": 3}, "is one of 3 shards: merge them first with llama-gguf-split --merge"),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model: bert cannot be converted"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tiny_llama(**changes).write(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match=f"^model.gguf: {problem}"):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "rope_factors_long.weight", "blk.0.ffn_gate_exps.weight"])
def test_unknown_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.extra[name] = np.ones(16, np.float32)
    with pytest.raises(ModelFileError, match=rf"model\.gguf: {name} is no tensor of a Llama model"):
        convert(model.write(tmp_path / "model.gguf"), tmp_path / "out")


def test_rope_factors_of_another_scaling_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.extra["rope_freqs.weight"] = np.linspace(1, 9, 8, dtype=np.float32)
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight are not those of Llama 3.1"):
        convert(model.write(tmp_path / "model.gguf"), tmp_path / "out")


def test_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    del model.weights["model.norm.weight"]
    with pytest.raises(ModelFileError, match=r"model\.gguf: the tensor output_norm\.weight is missing"):
        convert(model.write(tmp_path / "model.gguf"), tmp_path / "out")


@pytest.mark.parametrize("value", [np.inf, -np.nan, 3.4e38])
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(value: float, tmp_path: Path) -> None:
    model = tiny_llama()
    model.weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    path = model.write(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.weight has values that are not finite"):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "MAX_SHARD_BYTES", 20_000)
    model = tiny_llama()
    convert(model.write(tmp_path / "model.gguf"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    loaded = {name: weight for file in files for name, weight in load_file(file).items()}
    assert loaded.keys() == index["weight_map"].keys() == model.weights.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in loaded.values())
    assert all(torch.equal(weight, expected(model, name)) for name, weight in loaded.items())
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())


def test_conversion_is_deterministic_and_readable_by_others(tmp_path: Path) -> None:
    path = tiny_llama().write(tmp_path / "model.gguf")
    convert(path, tmp_path / "one")
    convert(path, tmp_path / "two")
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(path.stat().st_mode)


def test_out_with_files_is_left_as_it_is(tmp_path: Path) -> None:
    path = tiny_llama().write(tmp_path / "model.gguf")
    (tmp_path / "empty").mkdir()
    convert(path, tmp_path / "empty")
    before = {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()}
    for out in (tmp_path / "empty", path):
        with pytest.raises(UserError, match=f"out: {out} is there and not empty"):
            convert(path, out)
    assert {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()} == before


@pytest.mark.parametrize("size", [100, 10_000, 60_000])
def test_full_disk_names_the_file_and_leaves_nothing(size: int, tmp_path: Path) -> None:
    path = tiny_llama().write(tmp_path / "model.gguf")
    with full_beyond(size), pytest.raises(OSError, match=r"too large|json|safetensors"):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
