"""Models and SAEs of a given shape with random weights: speed does not depend on their values."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from rudder.sae_models import PRETRAINED, fidelity, sae
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle import catalogue
from rudder.sae_models.bundle.bundle import Bundle


@dataclass(frozen=True)
class Shape:
    """A Llama of `layers` layers and width `width`."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    max_len: int = 4096


SHAPES = {
    "llama-100m": Shape(768, 12, 12, 12, 2048, 32000),
    "llama-8b": Shape(4096, 32, 32, 8, 14336, 128256),
    "llama-8b-4-layers": Shape(4096, 4, 32, 8, 14336, 128256),
    "tiny": Shape(128, 2, 4, 4, 256, 8192),
}


def write_model(folder: Path, shape: Shape) -> Path:
    """Write a model folder with configuration and tokenizer; `load_format: dummy` draws the weights."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PRETRAINED / "textbook-lm" / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "intermediate_size": shape.intermediate, "vocab_size": shape.vocab,
        "head_dim": shape.width // shape.heads, "max_position_embeddings": shape.max_len, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_bundle(
    folder: Path, site: str, width: int, latents: int, seed: int = 0, k: int = 0, model: bundles.Model | None = None
) -> Bundle:
    """Write a bundle of random unit directions: a TopK SAE of `k` active latents, or else an SAE whose thresholds let
    about 32 latents of a random token be active. `model`: that of the SAE; None: one of random weights.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(latents, width, generator=generator), dim=1)
    inputs = torch.randn(64, width, generator=generator)
    threshold = (inputs @ directions.T).topk(min(32, latents), dim=1).values[:, -1].mean()
    thresholds = torch.zeros(latents) if k else threshold.expand(latents).clone()
    weights = sae.SAE(
        directions, torch.zeros(latents), thresholds, directions.clone(), torch.zeros(width),
        selection=sae.TopK(k) if k else None,
    )  # fmt: skip
    encoded = weights.encode(inputs)
    training = bundles.Training(
        tokens=0, seed=seed, l0=fidelity.l0(encoded), fvu=fidelity.fvu(inputs, weights.decode(encoded)),
        ce_recovered=0.0, dead_share=0.0,
        credit="random weights, for benchmarks",
    )  # fmt: skip
    name = f"random-{latents}"
    manifest = bundles.describe(
        weights,
        name=name,
        model=model or bundles.Model("random", "", width),
        sites=(site,),
        architecture="random",
        training=training,
    )
    statistics = bundles.Statistics(
        torch.full((latents,), 4.0),
        torch.full((latents,), 32 / latents),
        torch.zeros(width),
        torch.tensor(float(width) ** 0.5),
    )
    words = (catalogue.Latent(catalogue.Summary(i, f"random {i}", 32 / latents, 4.0), (), ()) for i in range(latents))
    draft = folder.parent / f"{folder.name}.sqlite"
    catalogue.write(draft, words)
    conformance = bundles.conformance_of(weights, inputs)
    return bundles.write(folder, manifest, weights, statistics, conformance, draft)
