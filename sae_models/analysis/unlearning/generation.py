"""Sampling behind an edit, with a KV cache, as a server generates."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rudder.sae_models.activations.hooks import Site, hooked
from rudder.sae_models.analysis.unlearning.rig import Context, Edit

TEMPERATURE = 0.8
NGRAM = 4


class Stream:
    """An edit of texts that arrive in parts: the prompt [n, length, d] first, then token by token.

    The edit sees a text from its start at each step: what it does to a token depends on tokens before it alone.
    """

    def __init__(self, edit: Edit, skip_first: bool) -> None:
        self.edit = edit
        self.skip_first = skip_first
        self.x: Tensor | None = None
        self.prompt = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the edited part."""
        if self.x is None:
            self.prompt = x.shape[1]
        self.x = x if self.x is None else torch.cat([self.x, x], 1)
        counted = torch.ones(self.x.shape[:2], dtype=torch.bool)
        counted[:, : int(self.skip_first)] = False
        prompt = torch.full((len(x),), self.prompt)
        return self.edit(Context(self.x, counted, prompt)).x[:, -x.shape[1] :]


@torch.no_grad()
def sample(
    model: Any,
    prompts: Tensor,
    tokens: int,
    seed: int,
    site: Site | None = None,
    edit: Edit | None = None,
    skip_first: bool = True,
) -> Tensor:
    """Sample continuations [n, tokens] of prompts [n, length] that are equally long, at TEMPERATURE.

    The noise depends on the seed alone, so that methods are compared on the same draws. `skip_first`: the first token
    is BOS, which is not edited.
    """
    generator, cache, drawn = torch.Generator().manual_seed(seed), DynamicCache(), list[Tensor]()
    with ExitStack() as stack:
        if site is not None and edit is not None:
            stack.enter_context(hooked(model, site, Stream(edit, skip_first)))
        part = prompts
        for _ in range(tokens):
            logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            uniform = torch.rand(logits.shape, generator=generator).clamp_min(1e-20)
            part = (logits / TEMPERATURE - (-uniform.log()).log()).argmax(-1, keepdim=True)
            drawn.append(part)
    return torch.cat(drawn, 1)


def repeated_share(tokens: Tensor) -> Tensor:
    """Return the share of 4-grams of each text [n, length] that it already had [n]."""
    grams = tokens.unfold(1, NGRAM, 1)
    return torch.tensor([1 - len({*map(tuple, text.tolist())}) / len(text) for text in grams])
