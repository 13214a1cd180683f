"""Tiny random models of every supported architecture, as folders that vLLM and transformers both load."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 160
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 32}
SANDWICH = {"query_pre_attn_scalar": 32, "sliding_window": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    # The CPU engine's own soft-capped attention differs from transformers by 2e-3, with and without edits.
    "gemma2": GROUPED | SANDWICH | {"tie_word_embeddings": True, "attn_logit_softcapping": None},
    "gemma3_text": GROUPED | SANDWICH | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 128},
    "gpt_neox": {"intermediate_size": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "phi3": GROUPED | {"original_max_position_embeddings": 128},
}
# Those whose layers represent the residual stream in another way, and a few more: tested without a compiled graph.
OTHERS: dict[str, dict[str, Any]] = {
    "cohere": GROUPED | {"logit_scale": 1.0, "tie_word_embeddings": True},
    "stablelm": GROUPED,
    "glm4": GROUPED,
    "granite": GROUPED | {"residual_multiplier": 0.22, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "olmo2": GROUPED,
    "bloom": {"n_layer": 3, "n_head": 2, "tie_word_embeddings": True},
    "falcon": {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False},
}

# Hook points that are refused, with the reason; all others are served. `docs/architectures.md` is generated from this.
PARALLEL = {"resid_mid": "its branches do not follow one another: both read resid_pre"}
REFUSED: dict[str, dict[str, str]] = {
    "gpt_neox": PARALLEL,
    "cohere": PARALLEL,
    "falcon": PARALLEL,
}


def write(name: str, folder: Path) -> Path:
    """Write a model with random weights, large enough that an edit shows in its logits."""
    torch.manual_seed(0)
    common = {} if name == "gpt2" else COMMON
    tokens = {
        key: COMMON[key]
        for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    }
    config = AutoConfig.for_model(name, **(tokens | common | (ARCHITECTURES | OTHERS)[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder
