"""Residuals of a causal language model, as a stream of mixed batches."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_models.training.corpus import Windows
from sae_models.training.sites import Site, hooked, layer_at, layers_of

WINDOWS_A_PASS = 32


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path) -> Any:
    """A checkpoint's causal LM in float32. FileNotFoundError: not a checkpoint."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: no config.json in {folder}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_trunk(folder: Path, site: Site) -> Any:
    """A checkpoint's causal LM without the layers above the site. ValueError: the model lacks the site."""
    model = load_model(folder)
    layer_at(model, site)
    del layers_of(model)[site.layer + 1 :]
    return model


@torch.inference_mode()
def residuals(trunk: Any, site: Site, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Pass by pass: residuals [windows, length, d] and counted [windows, length], which leaves out BOS and padding."""
    seen: list[Tensor] = []
    with hooked(trunk, site, seen.append):
        for start in range(0, len(windows), WINDOWS_A_PASS):
            part = windows.take(torch.arange(start, min(start + WINDOWS_A_PASS, len(windows))))
            trunk.base_model(part.tokens, use_cache=False)
            yield seen.pop(), part.counted


def counted_residuals(trunk: Any, site: Site, windows: Windows) -> Tensor:
    """All counted residuals [n, d] at once."""
    return torch.cat([x[counted] for x, counted in residuals(trunk, site, windows)])


def batches(chunks: Iterable[Tensor], size: int, pool: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [size, d] drawn from a pool of about `pool` tokens that chunks [n, d] refill; a rest is dropped."""
    held: list[Tensor] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk)
        if count >= pool:
            mixed = _shuffled(held, generator)
            half = count // 2 // size * size
            yield from mixed[:half].split(size)
            held, count = [mixed[half:]], count - half
    if held:
        mixed = _shuffled(held, generator)
        yield from mixed[: count // size * size].split(size)


def _shuffled(chunks: list[Tensor], generator: torch.Generator) -> Tensor:
    tokens = torch.cat(chunks)
    return tokens[torch.randperm(len(tokens), generator=generator)]
