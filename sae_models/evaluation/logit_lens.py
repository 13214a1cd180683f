"""The logit lens: the tokens that a decoder direction makes more or less likely, through the model's unembedding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rudder.sae_models.bundle.catalogue import Word
from rudder.sae_models.errors import UserError
from rudder.sae_models.evaluation import label_score
from rudder.sae_models.token_text import token_name

TOP_WORDS = 10
# Cap on logits held at a time: 64 MB in float32.
LOGITS_PER_CHUNK = 1 << 24
# Paths of the final norm in models of transformers.
FINAL_NORMS = (
    "model.norm",
    "transformer.ln_f",
    "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm",
    "model.language_model.norm",
)


@torch.no_grad()
def unembedding(model: Any) -> Tensor:
    """Return the unembedding [V, d] of a causal LM times the gain of its final norm.

    ValueError: the model has no output embedding.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"model: {type(model).__name__} has no output embedding")
    weight: Tensor = head.weight.float()
    modules = (_module(model, path) for path in FINAL_NORMS)
    norm = next((module for module in modules if module is not None), None)
    return weight if norm is None else weight * _gain(norm, weight.shape[1])


def _module(model: Any, path: str) -> nn.Module | None:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model if isinstance(model, nn.Module) else None


def _gain(norm: nn.Module, width: int) -> Tensor:
    """Measure the gain [d] of a norm on an input, since some modules store the gain and some the gain minus 1.

    v has mean 0 and mean square 1, so every norm maps it to gain * v + bias.
    """
    v = torch.ones(width)
    v[1::2] = -1
    up, down = norm(v[None])[0], norm(-v[None])[0]
    gain: Tensor = (up - down).float() / 2 / v
    return gain


@torch.no_grad()
def words(
    decoder: Tensor, unembedded: Tensor, vocabulary: Tensor, tokenizer: Any
) -> Iterator[tuple[tuple[Word, ...], tuple[Word, ...]]]:
    """Yield for every row of a decoder [F, d] the tokens that it promotes and suppresses most.

    `unembedded` [V, d] is the unembedding. Only tokens of the vocabulary [n] are candidates: the embeddings of tokens
    that no text uses were never trained and are far from all others.
    """
    unembedded = unembedded[vocabulary]
    k = min(TOP_WORDS, len(unembedded))
    with tqdm(total=len(decoder), unit="latent", desc="logit lens") as progress:
        for rows in decoder.split(max(1, LOGITS_PER_CHUNK // len(unembedded))):
            logits = rows.float() @ unembedded.T
            logits -= logits.mean(1, keepdim=True)
            extremes = logits.topk(k), logits.topk(k, largest=False)
            promoted, suppressed = (_words(vocabulary[top.indices], top.values, tokenizer) for top in extremes)
            yield from zip(promoted, suppressed, strict=True)
            progress.update(len(rows))


@torch.no_grad()
def agreement(
    decoder: Tensor, unembedded: Tensor, vocabulary: Tensor, named: Sequence[Sequence[int]]
) -> Iterator[float | None]:
    """Yield for every row of a decoder [F, d] how it raises the logits of named tokens: the area under their ROC curve
    among the vocabulary [n], 0.5 at chance; None without any.

    `named`: for each row, indices into the vocabulary. What `add` does at one times the decoder row, to first order.
    """
    unembedded = unembedded[vocabulary]
    row = 0
    for rows in decoder.split(max(1, LOGITS_PER_CHUNK // len(unembedded))):
        for logits in rows.float() @ unembedded.T:
            yield _area(logits, named[row])
            row += 1


def _area(logits: Tensor, named: Sequence[int]) -> float | None:
    if not 0 < len(named) < len(logits):
        return None
    is_named = torch.zeros(len(logits), dtype=torch.bool)
    is_named[list(named)] = True
    return label_score.area_under_curve(logits[is_named].numpy(), logits[~is_named].numpy())


def _words(tokens: Tensor, logits: Tensor, tokenizer: Any) -> list[tuple[Word, ...]]:
    text: dict[int, str] = {token: token_name(token, tokenizer) for token in tokens.unique().tolist()}
    pairs: Sequence[tuple[list[int], list[float]]] = list(zip(tokens.tolist(), logits.tolist(), strict=True))
    return [tuple(Word(text[t], value) for t, value in zip(*pair, strict=True)) for pair in pairs]
