"""A model, its twin that never read the topic, and texts with the residuals at the site where programs act.

The residuals are computed once. Behind an edit only the layers above the site run again, and only on texts that the
edit touches: on all others the output cannot differ.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.hooks import Site, layers_of, parse_site
from rudder.sae_models.analysis.program import Effect
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.errors import UserError
from rudder.sae_models.tokens import bos_token_id

# Windows, counted as in Windows.passes, that go through the layers above the site together.
WINDOWS_PER_PASS = 8
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Context:
    """What an edit knows of texts: residuals x [n, length, d]; counted [n, length], False at BOS, padding and excluded
    positions; prompt [n], the number of leading tokens that are a request's prompt.
    """

    x: Tensor
    counted: Tensor
    prompt: Tensor


Edit = Callable[[Context], Effect]


@dataclass(frozen=True)
class Texts:
    """Windows with their residuals x [n, length, d] at the site, and prompt [n] as in Context. scored [n, length]: the
    tokens whose probability is asked for.
    """

    windows: Windows
    x: Tensor
    prompt: Tensor
    scored: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def take(self, index: Tensor) -> "Texts":
        """Select the texts with these indices [m]."""
        return Texts(self.windows.take(index), self.x[index], self.prompt[index], self.scored[index])

    def where(self, mask: Tensor) -> "Texts":
        """Select the texts for which mask [n] is True."""
        return self.take(mask.nonzero().flatten())

    def context(self, index: Tensor, limit: int | None = None) -> Context:
        """Return what an edit reads of the texts with these indices, without columns of padding alone; at most `limit`
        tokens of each.
        """
        length = min(int(self.windows.size[index].max()), limit or self.windows.tokens.shape[1])
        return Context(self.x[index, :length], self.windows.counted[index, :length], self.prompt[index])


@dataclass(frozen=True)
class Rig:
    """A model, its twin (or None), their tokenizer and a bundle of the model."""

    model: Any
    twin: Any
    tokenizer: Any
    bundle: Bundle

    @property
    def site(self) -> Site:
        """The bundle's site."""
        return parse_site(self.bundle.manifest.site)

    @property
    def begins_with_bos(self) -> bool:
        """Whether texts begin with BOS, which is not edited."""
        return bos_token_id(self.tokenizer) is not None

    @cached_property
    def trunk(self) -> Any:
        """The model without the layers above the site."""
        trunk = copy.deepcopy(self.model)
        del layers_of(trunk)[self.site.layer + 1 :]
        trunk.config.get_text_config().num_hidden_layers = self.site.layer + 1
        return trunk

    @cached_property
    def upper(self) -> Any:
        """The layers above the site with the head: a model whose input embeddings are the residuals at the site."""
        if self.site.point not in ("resid_pre", "resid_post"):
            raise UserError(f"bundle: its site is {self.site}, not resid_pre or resid_post of a layer")
        upper = copy.deepcopy(self.model)
        del layers_of(upper)[: self.site.layer + (self.site.point == "resid_post")]
        require_same(self.model, upper, self.trunk, self.site)
        return upper

    def texts(self, windows: Windows, prompt: Tensor | None = None) -> Texts:
        """Run the model up to the site. With prompts [n], the tokens behind them are scored; otherwise all are, and the
        texts are prompts as a whole.
        """
        parts = [x for x, _ in harvest.residuals(self.trunk, self.site, windows)]
        length, x = windows.tokens.shape[1], windows.tokens.new_zeros(0)
        x = parts[0].new_zeros(len(windows), length, parts[0].shape[-1]) if parts else x
        start = 0
        for part in parts:
            x[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        if prompt is None:
            return Texts(windows, x, windows.size, windows.counted)
        behind = torch.arange(length) >= prompt[:, None]
        return Texts(windows, x, prompt, windows.counted & behind)

    def encode(self, beginnings: Sequence[str], endings: Sequence[str] | None = None) -> tuple[Windows, Tensor]:
        """Return a window of each text with BOS in front, and the number of its tokens without the ending."""
        bos = bos_token_id(self.tokenizer)
        head = [[*([] if bos is None else [bos]), *self.token_ids(text)] for text in beginnings]
        tail = [self.token_ids(text) for text in endings or [""] * len(head)]
        rows = [torch.tensor([*first, *rest]) for first, rest in zip(head, tail, strict=True)]
        size = torch.tensor([len(row) for row in rows])
        tokens = pad_sequence(rows, batch_first=True)
        position = torch.arange(tokens.shape[1])
        counted = (position < size[:, None]) & (position >= (bos is not None))
        return Windows(tokens, counted, torch.arange(len(rows)), size), torch.tensor([len(first) for first in head])

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def require_same(model: Any, upper: Any, trunk: Any, site: Site) -> None:
    """Raise UserError unless the layers above the site, run on what is there, give the model's own output."""
    tokens = torch.arange(2, 18)[None]
    with torch.no_grad():
        ((x,),) = harvest.activations(trunk, [site], [{"input_ids": tokens}])
        own = head(upper, upper.base_model(inputs_embeds=x, use_cache=False).last_hidden_state)
        difference = (own - model(tokens).logits).abs().max()
    if not difference < TOLERANCE:
        raise UserError(f"model: its layers above {site} cannot be run on their own: outputs differ by {difference:g}")


def head(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [..., V] of last hidden states [..., d]."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits.float()


def passes(windows: Windows) -> Iterator[tuple[Tensor, Windows]]:
    """Yield the windows of each forward pass, with their indices."""
    for index in windows.passes(WINDOWS_PER_PASS):
        yield index, windows.take(index).trimmed()


@torch.no_grad()
def run_whole(model: Any, texts: Texts) -> tuple[Tensor, Tensor]:
    """Return log p and hits of a whole model at each scored next token [n, length - 1], 0 elsewhere."""
    log_p, hits = torch.zeros(texts.scored[:, 1:].shape), torch.zeros(texts.scored[:, 1:].shape)
    for index, part in passes(texts.windows):
        hidden = model.base_model(part.tokens, use_cache=False).last_hidden_state
        _score(log_p, hits, index, texts, model, hidden)
    return log_p, hits


@torch.no_grad()
def run_edited(rig: Rig, texts: Texts, edit: Edit, plain: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p and hits as `run_whole` does, behind an edit at the site, and the tokens touched [n, length].

    `plain`: those of the model itself, which hold for texts that the edit does not touch.
    """
    log_p, hits = plain[0].clone(), plain[1].clone()
    touched = torch.zeros_like(texts.windows.counted)
    for index, _ in passes(texts.windows):
        effect = edit(texts.context(index))
        touched[index, : effect.touched.shape[1]] = effect.touched
        hit = effect.touched.any(1)
        if hit.any():
            hidden = rig.upper.base_model(inputs_embeds=effect.x[hit], use_cache=False).last_hidden_state
            _score(log_p, hits, index[hit], texts, rig.upper, hidden)
    return log_p, hits, touched


def _score(log_p: Tensor, hits: Tensor, index: Tensor, texts: Texts, model: Any, hidden: Tensor) -> None:
    """Write what a model with these last hidden states [m, length, d] gives the texts number `index` [m]."""
    length = hidden.shape[1]
    tokens, scored = texts.windows.tokens[index, 1:length], texts.scored[index, 1:length]
    logits = head(model, hidden[:, :-1][scored])
    nexts = tokens[scored]
    values = torch.stack([logits.gather(1, nexts[:, None])[:, 0] - logits.logsumexp(1), logits.argmax(1) == nexts])
    for target, value in zip((log_p, hits), values, strict=True):
        filled = torch.zeros(scored.shape)
        filled[scored] = value
        target[index, : length - 1] = filled
