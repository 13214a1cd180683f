"""A small random model with the shipped tokenizer, a small corpus, and the configuration of a run on them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.activations.samples import TextSample, sample_vectors
from rudder.sae_models.bundle import bundle
from rudder.sae_models.training import config
from rudder.sae_models.training.config import Config

TEXTBOOK_LM = PRETRAINED / "textbook-lm"
WORDS = ("cells", "divide", "viruses", "need", "host", "king", "may", "rule", "state", "of", "free", "people", "peace")


def save_model(folder: Path, layers: int = 2) -> Path:
    """Save a random Llama of width 16."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=8192,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TEXTBOOK_LM / name, folder / name)
    return folder


def save_corpus(path: Path, documents: int = 120) -> Path:
    """Write sections of two books, which use different words in different orders."""
    with path.open("w") as file:
        for number in range(documents):
            book = number % 2
            words = [WORDS[(number * i + i * i + book) % len(WORDS)] for i in range(60)]
            text = " ".join(words)
            record = {"book": f"book{book}", "module": f"m{number}", "text": text, "complexity": number % 11}
            file.write(json.dumps(record) + "\n")
    return path


def real_vectors(sites: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """Return vectors [n, d] of the shipped model at some sites, on the contexts of the shipped catalogue."""
    shipped = bundle.open_unverified(PRETRAINED / "textbook-lm-layers.2")
    contexts = (context for index in range(0, 400, 4) for context in shipped.catalogue.get(index).contexts[:1])
    text = "\n".join(f"{context.before}{context.token}{context.after}" for context in contexts)
    shipped.catalogue.close()
    tokenizer, documents = harvest.load_tokenizer(TEXTBOOK_LM), [Document("", "", text)]
    trunk = harvest.load_trunk(TEXTBOOK_LM, *map(parse_site, sites))
    windows = corpus.windows(documents, tokenizer, 256)
    return dict(sample_vectors(TextSample(trunk, tokenizer, documents, windows), tuple(sites), tokens))


def plain(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a run's configuration as plain values; write model and corpus to the folder."""
    sae = {"architecture": "batch_topk", "site": "layers.0.resid_post", "latents": 32, "k": 4, "learning_rate": 3e-3}
    return {
        "model": str(save_model(folder / "model")),
        "corpus": str(save_corpus(folder / "corpus.jsonl")),
        "out": str(folder / "run"),
        "sae": {**sae, "precision": "float32"},
        "tokens": 12_800,
        "batch": 64,
        "window": 32,
        "log_every": 10,
        "checkpoint_every": 40,
        "device": "cpu",
        "data": {"block": 2000},
        "evaluation": {
            "tokens": 600,
            "loss_tokens": 300,
            "probe_windows": 20,
            "catalogue_tokens": 1000,
        },
        **changes,
    }


def configuration(folder: Path, **changes: Any) -> Config:
    """Return the same as a Config."""
    return config.convert(plain(folder, **changes))
