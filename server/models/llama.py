"""Llama family: configuration and weights of a GGUF file, in the form of Transformers' LlamaForCausalLM.

llama.cpp writes Mistral, SmolLM2, TinyLlama and others as the architecture `llama`, too. What is not understood is
refused by name: a model that ignores a setting still answers, only worse.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudder.server.models.gguf_file import GGUFFile, ModelFileError

ARCHITECTURE = "llama"
# Metadata of the architecture that is used below, or does not change what the model computes.
UNDERSTOOD = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "expert_count", "expert_used_count",
    "feed_forward_length", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type", "tensor_data_layout",
    "vocab_size",
}  # fmt: skip
EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Llama 3.1's rescaling of rotary frequencies: GGUF has its result only, one factor per frequency.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Weight(NamedTuple):
    """A weight of the model: name of its tensor in the file, shape, and the number of heads whose rows are in the
    order of llama.cpp (0: rows are as in Transformers).
    """

    source: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


def config_of(file: GGUFFile) -> dict[str, Any]:
    """Return the content of config.json. ModelFileError: another architecture, or a setting that is not understood."""
    require_understood(file)
    heads, width = file.value("llama.attention.head_count", int), file.value("llama.embedding_length", int)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": file.shape(EMBEDDING)[0],
        "hidden_size": width,
        "intermediate_size": file.value("llama.feed_forward_length", int),
        "num_hidden_layers": file.value("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.value("llama.attention.head_count_kv", int, heads),
        "head_dim": file.value("llama.attention.key_length", int, width // max(heads, 1)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": file.value("llama.context_length", int),
        "rms_norm_eps": shortest(file.value("llama.attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": OUTPUT not in file.tensors,
    }
    require_consistent(file, config)
    return {**config, "rope_parameters": rope_parameters(file, config["head_dim"])}


def require_understood(file: GGUFFile) -> None:
    """Raise ModelFileError for another architecture, experts, or a setting that this module does not know."""
    architecture = file.value("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise ModelFileError(f"{file.name}: the architecture is {architecture}; only {ARCHITECTURE} can be converted")
    prefix = f"{ARCHITECTURE}."
    unknown = [key for key in file.metadata if key.startswith(prefix) and key.removeprefix(prefix) not in UNDERSTOOD]
    if unknown:
        raise ModelFileError(f"{file.name}: {', '.join(unknown)}: a setting that cannot be converted")
    if experts := file.value("llama.expert_count", int, 0):
        raise ModelFileError(f"{file.name}: llama.expert_count: {experts} experts cannot be converted")


def require_consistent(file: GGUFFile, config: dict[str, Any]) -> None:
    """Raise ModelFileError unless sizes are positive, heads are of one even size, and heads divide as Transformers
    requires.
    """
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if config[key] < 1:
            raise ModelFileError(f"{file.name}: {key} is {config[key]}")
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    if heads % groups or size % 2 or config["hidden_size"] % heads:
        raise ModelFileError(f"{file.name}: {heads} heads of {size} in {groups} groups, width {config['hidden_size']}")
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.value(f"llama.{key}", int, size) != size:
            raise ModelFileError(f"{file.name}: llama.{key} is not the size of a head, {size}")


def shortest(value: float) -> float:
    """Return the shortest decimal number that is the same float32."""
    return float(str(np.float32(value)))


def rope_parameters(file: GGUFFile, size: int) -> dict[str, Any]:
    """Return `rope_parameters` of config.json: base, and linear or Llama 3 scaling. ModelFileError: other scaling."""
    theta = shortest(file.value("llama.rope.freq_base", float, 10000.0))
    linear = file.value("llama.rope.scale_linear", float, 1.0)
    factor = shortest(file.value("llama.rope.scaling.factor", float, linear))
    kind = file.value("llama.rope.scaling.type", str, "none" if factor in (0.0, 1.0) else "linear")
    if kind not in ("none", "linear"):
        raise ModelFileError(f"{file.name}: llama.rope.scaling.type: {kind} cannot be converted")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if ROPE_FACTORS in file.tensors:
        parameters |= llama3_scaling(file, theta, size)
    if kind == "linear" and factor not in (0.0, 1.0):
        if parameters["rope_type"] != "default":
            raise ModelFileError(f"{file.name}: {ROPE_FACTORS} and llama.rope.scaling.factor cannot be combined")
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters


def llama3_scaling(file: GGUFFile, theta: float, size: int) -> dict[str, Any]:
    """Return the parameters of Llama 3.1's scaling that give the file's factors. ModelFileError: none do."""
    factors = file.tensor(ROPE_FACTORS).double()
    factor = shortest(float(factors.max())) if len(factors) else 1.0
    expected = torch.tensor(llama3_factors(factor, theta, size), dtype=torch.float64)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise ModelFileError(f"{file.name}: {ROPE_FACTORS} are not those of Llama 3.1 and cannot be converted")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE} if factor != 1.0 else {}


def llama3_factors(factor: float, theta: float, size: int) -> list[float]:
    """Return by how much Llama 3.1 divides each of the size/2 rotary frequencies (Transformers: `llama3` of
    modeling_rope_utils).
    """
    low, high, original = LLAMA3_ROPE.values()
    factors = []
    for index in range(0, size, 2):
        turns = original * theta ** (-index / size) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def weights_of(file: GGUFFile, config: dict[str, Any]) -> dict[str, Weight]:
    """Return the weights by their names in Transformers. ModelFileError: a tensor is missing, unknown, or of another
    shape than the configuration says.
    """
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    weights = {
        "model.embed_tokens.weight": Weight(EMBEDDING, (vocabulary, width)),
        "model.norm.weight": Weight("output_norm.weight", (width,)),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = Weight(OUTPUT, (vocabulary, width))
    for layer in range(config["num_hidden_layers"]):
        for name, weight in layer_weights(config).items():
            source = f"blk.{layer}.{weight.source}.weight"
            weights[f"model.layers.{layer}.{name}.weight"] = weight._replace(source=source)
            # Before the next layer: a file may claim billions of them.
            require_shape(file, weights[f"model.layers.{layer}.{name}.weight"])
    for weight in weights.values():
        require_shape(file, weight)
    unknown = set(file.tensors) - {weight.source for weight in weights.values()} - {ROPE_FACTORS}
    if unknown:
        raise ModelFileError(f"{file.name}: {min(unknown)} is no tensor of a Llama model that can be converted")
    return weights


def layer_weights(config: dict[str, Any]) -> dict[str, Weight]:
    """Return the weights of a layer by their names within it in Transformers."""
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "input_layernorm": Weight("attn_norm", (width,)),
        "self_attn.q_proj": Weight("attn_q", (heads * size, width), heads),
        "self_attn.k_proj": Weight("attn_k", (groups * size, width), groups),
        "self_attn.v_proj": Weight("attn_v", (groups * size, width)),
        "self_attn.o_proj": Weight("attn_output", (width, heads * size)),
        "post_attention_layernorm": Weight("ffn_norm", (width,)),
        "mlp.gate_proj": Weight("ffn_gate", (inner, width)),
        "mlp.up_proj": Weight("ffn_up", (inner, width)),
        "mlp.down_proj": Weight("ffn_down", (width, inner)),
    }


def require_shape(file: GGUFFile, weight: Weight) -> None:
    """Raise ModelFileError unless the file has the tensor in this shape."""
    if (shape := file.shape(weight.source)) != weight.shape:
        raise ModelFileError(f"{file.name}: {weight.source} has the shape {list(shape)}, not {list(weight.shape)}")


def read_weight(file: GGUFFile, weight: Weight) -> Tensor:
    """Return a weight in bfloat16. ModelFileError: it has values that are not finite, or an unknown type."""
    values = file.tensor(weight.source).bfloat16()
    if not bool(values.isfinite().all()):
        raise ModelFileError(f"{file.name}: {weight.source} has values that are not finite in bfloat16")
    return separate_rotary_halves(values, weight.rotary_heads) if weight.rotary_heads else values


def separate_rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k, [heads * size, d], from llama.cpp's order to that of Transformers.

    Rotary frequency i turns a pair of rows of a head: 2i and 2i + 1 in llama.cpp, i and i + size/2 in Transformers.
    """
    pairs: Tensor = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()
