"""Tiny Llama models as GGUF files, with rows of q and k in the order of llama.cpp; and as packages that pip finds."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from rudder.server.models.package import Package

Array = npt.NDArray[np.float32]
# How GPT-2 spells bytes: printable ones as they are, others from U+0100.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLING = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + rank) for rank, byte in enumerate(OTHERS)}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ċ Ċ", "Ġ Ġ"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny Llama. `size`: of a head."""

    heads: int = 4
    groups: int = 2
    size: int = 16
    width: int = 32
    inner: int = 64
    layers: int = 2
    vocabulary: int = 288
    tied: bool = True

    def settings(self) -> dict[str, Any]:
        """Return the metadata of the architecture, without its prefix."""
        return {
            "block_count": self.layers, "context_length": 128, "embedding_length": self.width,
            "feed_forward_length": self.inner, "attention.head_count": self.heads,
            "attention.head_count_kv": self.groups, "attention.key_length": self.size,
            "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 50000.0, "rope.dimension_count": self.size,
        }  # fmt: skip


@dataclass
class TinyLlama:
    """A GGUF file to write: weights by their names in Transformers, and metadata, to be changed before writing."""

    shape: Shape
    weights: dict[str, Array]
    metadata: dict[str, Any]
    extra: dict[str, Array] = field(default_factory=dict)
    quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32

    def write(self, path: Path) -> Path:
        """Write the file; matrices are quantized, vectors are float32."""
        writer = gguf.GGUFWriter(path, self.metadata["general.architecture"])
        for key, value in self.metadata.items():
            add(writer, key, value)
        for name, values in self.tensors().items():
            quantize = values.ndim > 1
            stored = gguf.quants.quantize(values, self.quantized) if quantize else values
            writer.add_tensor(name, stored, raw_dtype=self.quantized if quantize else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def tensors(self) -> dict[str, Array]:
        """Return the tensors by their names in the file."""
        heads = {"self_attn.q_proj": self.shape.heads, "self_attn.k_proj": self.shape.groups}
        tensors = {}
        for name, values in self.weights.items():
            if name.startswith("model.layers."):
                layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
                stored = interleaved(values, heads[part]) if part in heads else values
                tensors[f"blk.{layer}.{NAMES[part]}.weight"] = stored
        outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        for theirs, ours in outer.items():
            if f"{theirs}.weight" in self.weights:
                tensors[f"{ours}.weight"] = self.weights[f"{theirs}.weight"]
        return {**tensors, **self.extra}


def interleaved(weight: Array, heads: int) -> Array:
    """Reorder the rows of q or k as llama.cpp's convert_hf_to_gguf.py does."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def tiny_llama(shape: Shape = Shape(), seed: int = 0, **changes: Any) -> TinyLlama:
    """Return a model with random weights; `changes`: metadata with "__" for ".", None removes a key."""
    rng = np.random.default_rng(seed)
    sizes = {
        "self_attn.q_proj": (shape.heads * shape.size, shape.width),
        "self_attn.k_proj": (shape.groups * shape.size, shape.width),
        "self_attn.v_proj": (shape.groups * shape.size, shape.width),
        "self_attn.o_proj": (shape.width, shape.heads * shape.size),
        "mlp.gate_proj": (shape.inner, shape.width), "mlp.up_proj": (shape.inner, shape.width),
        "mlp.down_proj": (shape.width, shape.inner),
        "input_layernorm": (shape.width,), "post_attention_layernorm": (shape.width,),
    }  # fmt: skip
    named: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.width),
        "model.norm.weight": (shape.width,),
    }
    if not shape.tied:
        named["lm_head.weight"] = (shape.vocabulary, shape.width)
    for layer in range(shape.layers):
        named |= {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    weights = {name: rng.standard_normal(size, np.float32) for name, size in named.items()}
    metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in shape.settings().items()}}
    metadata |= byte_level_vocabulary() | {key.replace("__", "."): value for key, value in changes.items()}
    return TinyLlama(shape, weights, {key: value for key, value in metadata.items() if value is not None})


def byte_level_vocabulary() -> dict[str, Any]:
    """Return the metadata of a byte-level BPE with a chat template."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*CONTROL, *SPELLING.values(), *merged]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a value with the type that llama.cpp gives it."""
    kinds: Mapping[type, Any] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    if key != "general.architecture":
        kinds[type(value)](key, value)


def packed(file: Path, index: Path) -> Package:
    """Write a wheel `tiny-model` 1.0 that holds a file into a folder, and return its pin."""
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.write(file, f"tiny_model/{file.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = wheel.read_bytes()
    return Package("tiny-model", "1.0", hashlib.sha256(content).hexdigest(), len(content))


def use_only_folder(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip look into a folder and nowhere else, whatever this machine's configuration says."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index), "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
