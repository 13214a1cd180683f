"""The logit lens: which tokens a decoder direction makes more or less likely, read at the model's unembedding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rudder.sae_models.bundle.catalogue import Word
from rudder.sae_models.errors import UserError

TOP_WORDS = 10
# Logits held at a time: 64 MB in float32.
LOGITS_AT_ONCE = 1 << 24
FINAL_NORMS = (
    "model.norm",
    "transformer.ln_f",
    "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm",
    "model.language_model.norm",
)


@torch.no_grad()
def unembedding(model: Any) -> Tensor:
    """[V, d] of a causal LM, times the gain of its final norm. ValueError: it has no output embedding."""
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"model: {type(model).__name__} has no output embedding")
    weight: Tensor = head.weight.float()
    found = (_module(model, path) for path in FINAL_NORMS)
    norm = next((module for module in found if module is not None), None)
    return weight if norm is None else weight * _gain(norm, weight.shape[1])


def _module(model: Any, path: str) -> nn.Module | None:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model if isinstance(model, nn.Module) else None


def _gain(norm: nn.Module, width: int) -> Tensor:
    """Read off the norm itself, since some store the gain and some the gain less 1: of mean 0 and mean square 1, v
    comes out of every norm as gain * v + bias."""
    v = torch.ones(width)
    v[1::2] = -1
    up, down = norm(v[None])[0], norm(-v[None])[0]
    gain: Tensor = (up - down).float() / 2 / v
    return gain


@torch.no_grad()
def words(
    decoder: Tensor, unembedded: Tensor, vocabulary: Tensor, tokenizer: Any
) -> Iterator[tuple[tuple[Word, ...], tuple[Word, ...]]]:
    """For every row of a decoder [F, d] the tokens that it promotes and suppresses most, of an unembedding [V, d].

    Only tokens of the vocabulary [n] are told: those that no text uses were never trained, and are far from all others.
    """
    unembedded = unembedded[vocabulary]
    k = min(TOP_WORDS, len(unembedded))
    with tqdm(total=len(decoder), unit="latent", desc="logit lens") as progress:
        for rows in decoder.split(max(1, LOGITS_AT_ONCE // len(unembedded))):
            logits = rows.float() @ unembedded.T
            logits -= logits.mean(1, keepdim=True)
            most, least = logits.topk(k), logits.topk(k, largest=False)
            promoted, suppressed = (_words(vocabulary[top.indices], top.values, tokenizer) for top in (most, least))
            yield from zip(promoted, suppressed, strict=True)
            progress.update(len(rows))


def _words(tokens: Tensor, logits: Tensor, tokenizer: Any) -> list[tuple[Word, ...]]:
    text: dict[int, str] = {token: tokenizer.decode([token]) for token in tokens.unique().tolist()}
    rows: Sequence[tuple[list[int], list[float]]] = list(zip(tokens.tolist(), logits.tolist(), strict=True))
    return [tuple(Word(text[t], value) for t, value in zip(*row, strict=True)) for row in rows]
