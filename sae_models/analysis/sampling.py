"""Batched generation by a transformers model while directions are added at a site, and what the texts are like.

Sequences of a batch may have different directions and doses. The displacement is that of `sae_models.edit`, as an `add`
in residual norms on one row per direction. Equal seeds draw equal random numbers whatever the dose, so that steered and
unsteered texts differ by the dose alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models import edit as formula
from rudder.sae_models import operations
from rudder.sae_models.activations.hooks import Site, hooked
from rudder.sae_models.bundle.manifest import Context
from rudder.sae_models.tokens import bos_token_id, text_encoder

# Sequences that are continued together, and whose probabilities are computed together.
BATCH, SCORED = 64, 32
NO_EXCLUSION = Context()


@dataclass(frozen=True)
class Voice:
    """A model with its tokenizer, as texts are drawn from it: how many tokens, at which temperature. `context`: of the
    SAE's manifest; what it excludes is not edited.
    """

    model: Any
    tokenizer: Any
    tokens: int = 64
    temperature: float = 0.8
    context: Context = NO_EXCLUSION


@dataclass(frozen=True)
class Steering:
    """Directions [K, d] of norm 1 at a site; sequence i has direction `which[i]`, int [n], at `dose[i]` [n]."""

    site: Site
    directions: Tensor
    which: Tensor
    dose: Tensor

    def part(self, index: slice) -> "Steering":
        """Select sequences, and only their directions."""
        used, which = self.which[index].unique(return_inverse=True)
        return Steering(self.site, self.directions[used], which, self.dose[index])

    def edit(self, counted: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the edit of x [n, length, d] at the counted positions [n, length]."""
        parameters = torch.tensor(operations.IDENTITY_EDIT).repeat(len(self.which), len(self.directions), 1)
        rows = torch.arange(len(self.which))
        add = {**operations.OPERATIONS["add"](0.0), "above": -inf, "relative": 1.0}
        for name, value in add.items():
            parameters[rows, self.which, operations.EDIT.index(name)] = value
        parameters[rows, self.which, operations.EDIT.index("shift")] = self.dose.float()
        entry = torch.tensor(operations.IDENTITY_ENTRY, dtype=torch.float64)

        def edited(x: Tensor) -> Tensor:
            n, length, d = x.shape
            flat = x.reshape(-1, d).float()
            edits = parameters.transpose(1, 2).repeat_interleave(length, 0)
            f = torch.zeros(len(flat), len(self.directions))
            is_open = counted[:, -length:].reshape(-1)
            move, _ = formula.edit(flat, f, self.directions, edits, entry.expand(len(flat), -1), is_open)
            return (flat + move).reshape(n, length, d).to(x.dtype)

        return edited


@dataclass(frozen=True)
class Texts:
    """Generated texts: prompt [n, p], padded in front, with its mask [n, p], and the generated tokens [n, t]."""

    prompt: Tensor
    mask: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Tensor) -> "Texts":
        """Select texts."""
        return Texts(self.prompt[index], self.mask[index], self.tokens[index])


@dataclass(frozen=True)
class Likelihood:
    """Per text [n]: `nats`, the mean negative log-probability of its generated tokens under the plain model; `kl`, the
    divergence of the steered from the plain model, in nats per token, on the same tokens.
    """

    nats: Tensor
    kl: Tensor


def encoded(prompts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens [n, p] of prompts as the server reads them, padded in front, and the mask of tokens."""
    encoder, bos = text_encoder(tokenizer), bos_token_id(tokenizer)
    ids = [([] if bos is None else [bos]) + encoder.encode(prompt) for prompt in prompts]
    length = max(map(len, ids))
    pad = tokenizer.eos_token_id or 0
    tokens = torch.tensor([[pad] * (length - len(row)) + row for row in ids])
    size = torch.tensor([len(row) for row in ids])
    return tokens, torch.arange(length) >= length - size[:, None]


def editable(voice: Voice, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return where tokens [n, length], of which mask is True at texts, are edited: not at BOS, nor where excluded."""
    has_bos = int(bos_token_id(voice.tokenizer) is not None)
    context, length = voice.context, tokens.shape[1]
    first = length - mask.sum(1)
    position = torch.arange(length) - first[:, None]
    excluded = torch.isin(position, torch.tensor(context.excluded_positions, dtype=torch.long))
    excluded |= torch.isin(tokens, torch.tensor(context.excluded_tokens, dtype=torch.long))
    return (position >= has_bos) & ~excluded


@torch.no_grad()
def generate(voice: Voice, prompts: Sequence[str], seeds: Sequence[int], steering: Steering | None = None) -> Texts:
    """Continue each prompt by `voice.tokens` tokens, with the random numbers of its seed; never by an end of text."""
    return _joined([texts for texts, _ in _parts(voice, prompts, seeds, steering)])


@torch.no_grad()
def measured(
    voice: Voice, prompts: Sequence[str], seeds: Sequence[int], steering: Steering | None = None
) -> tuple[Texts, Likelihood]:
    """Generate texts; also return how likely they are to the plain model, and how far the steered one is from it."""
    texts, likely = list[Texts](), list[Likelihood]()
    for part, steered in _parts(voice, prompts, seeds, steering):
        texts.append(part)
        likely.append(likelihood(voice, part, None if steering is None else torch.stack(steered, 1)))
    nats, kl = (torch.cat([getattr(each, name) for each in likely]) for name in ("nats", "kl"))
    return _joined(texts), Likelihood(nats, kl)


def _parts(
    voice: Voice, prompts: Sequence[str], seeds: Sequence[int], steering: Steering | None
) -> Iterator[tuple[Texts, list[Tensor]]]:
    """Yield texts in batches, with the logits [n, V] from which each of their tokens was drawn."""
    prompt, mask = encoded(prompts, voice.tokenizer)
    numbers = torch.stack([torch.rand(voice.tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
    for start in range(0, len(prompt), BATCH):
        part = slice(start, start + BATCH)
        steered = steering.part(part) if steering else None
        tokens, logits = _continued(voice, prompt[part], mask[part], numbers[part], steered)
        yield Texts(prompt[part], mask[part], tokens), logits


def _joined(parts: Sequence[Texts]) -> Texts:
    return Texts(*(torch.cat([getattr(part, name) for part in parts]) for name in ("prompt", "mask", "tokens")))


def _continued(
    voice: Voice, prompt: Tensor, mask: Tensor, numbers: Tensor, steering: Steering | None
) -> tuple[Tensor, list[Tensor]]:
    tokens, cache, step, kept = prompt, None, prompt, list[Tensor]()
    for number in numbers.T:
        position = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -step.shape[1] :]
        counted = editable(voice, tokens, mask)
        result = _forward(
            voice, step, mask, counted, steering, position_ids=position, past_key_values=cache, use_cache=True
        )
        logits = result.logits[:, -1].float()
        kept.append(logits)
        cache, step = result.past_key_values, _drawn(voice, logits, number)[:, None]
        tokens = torch.cat([tokens, step], 1)
        mask = torch.cat([mask, torch.ones_like(step, dtype=torch.bool)], 1)
    return tokens[:, prompt.shape[1] :], kept


def _forward(
    voice: Voice, tokens: Tensor, mask: Tensor, counted: Tensor, steering: Steering | None, **options: Any
) -> Any:
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), **options}
    if steering is None:
        return voice.model(**inputs)
    with hooked(voice.model, steering.site, steering.edit(counted)):
        return voice.model(**inputs)


def _drawn(voice: Voice, logits: Tensor, number: Tensor) -> Tensor:
    """Return the tokens [n] that numbers [n] in [0, 1) draw from logits [n, V], by the inverse of the distribution."""
    tempered = logits / voice.temperature
    if voice.tokenizer.eos_token_id is not None:
        tempered[:, voice.tokenizer.eos_token_id] = -inf
    cumulative = tempered.softmax(1, dtype=torch.float64).cumsum(1)
    drawn = torch.searchsorted(cumulative, number.double()[:, None], right=True)[:, 0]
    return drawn.clamp_max(logits.shape[1] - 1)


@torch.no_grad()
def likelihood(voice: Voice, texts: Texts, steered: Tensor | None = None) -> Likelihood:
    """Return how likely texts are to the plain model, and how far the steered one is from it on them.

    `steered`: its logits [n, t, V] of the generated tokens; None: it is the plain one.
    """
    tokens = torch.cat([texts.prompt, texts.tokens], 1)
    mask = torch.cat([texts.mask, torch.ones_like(texts.tokens, dtype=torch.bool)], 1)
    position = (mask.long().cumsum(1) - 1).clamp_min(0)
    length = texts.tokens.shape[1]
    nats, kl = list[Tensor](), list[Tensor]()
    for start in range(0, len(texts), SCORED):
        part = slice(start, start + SCORED)
        inputs = {"input_ids": tokens[part], "attention_mask": mask[part].long(), "position_ids": position[part]}
        logits = voice.model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        plain = logits.float().log_softmax(-1)
        nats.append(-plain.gather(-1, texts.tokens[part, :, None])[..., 0].mean(1))
        kl.append(torch.zeros(len(plain)) if steered is None else _divergence(steered[part], plain))
    return Likelihood(torch.cat(nats), torch.cat(kl))


def _divergence(steered: Tensor, plain: Tensor) -> Tensor:
    """Return KL(steered || plain) [n] in nats per token, from logits and log-probabilities [n, t, V]."""
    log_p = steered.log_softmax(-1)
    return (log_p.exp() * (log_p - plain)).sum(-1).mean(1)


def repetition(tokens: Tensor, n: int = 4) -> Tensor:
    """Return the share [texts] of the n-grams of each text, tokens [texts, t], that repeat an earlier one."""
    grams = [row.unfold(0, n, 1) for row in tokens]
    return torch.tensor([1 - len(gram.unique(dim=0)) / len(gram) for gram in grams])


def distinct(tokens: Tensor, n: int = 2) -> float:
    """Return the distinct n-grams of texts [texts, t] by all their n-grams (arXiv 1510.03055)."""
    grams = tokens.unfold(1, n, 1).reshape(-1, n)
    return len(grams.unique(dim=0)) / len(grams)


def decoded(texts: Texts, tokenizer: Any) -> list[str]:
    """Return the generated texts, without their prompts."""
    result: list[str] = tokenizer.batch_decode(texts.tokens, skip_special_tokens=True)
    return result
