"""Splicing: the loss of a model with an SAE's output in place of the vectors at a site."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.hooks import Edit, Site, hooked
from rudder.sae_models.errors import UserError
from rudder.sae_models.sae import SAE

WINDOWS_PER_PASS = 8
COSINE_BLOCK = 1024


@torch.no_grad()
def max_cosines(directions: Tensor) -> Tensor:
    """Return each direction's largest cosine [F] with any other of [F, d]; near 1, two latents are duplicates."""
    unit = functional.normalize(directions.float(), dim=1)
    maxima = []
    for number, part in enumerate(tqdm(unit.split(COSINE_BLOCK), desc="cosines", unit="block")):
        cosines = part @ unit.T
        index = torch.arange(len(part))
        cosines[index, COSINE_BLOCK * number + index] = -1
        maxima.append(cosines.amax(1))
    return torch.cat(maxima)


@torch.inference_mode()
def losses(
    model: Any, windows: Windows, site: Site | None = None, edit: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Return (summed loss in nats, number of counted tokens) of each window [windows, 2], with an optional edit.

    The edit takes x [n, length, d] and counted [n, length], and returns the edited x.
    """
    sums = torch.zeros(len(windows), 2)
    for index in tqdm(windows.passes(WINDOWS_PER_PASS), desc="loss", unit="pass"):
        part = windows.take(index).trimmed()
        edits = [] if site is None or edit is None else [(site, by_position(edit, part.counted.to(model.device)))]
        nats = _nats(_log_probabilities(model, part, edits), part)
        sums[index] = torch.stack([nats.sum(1), part.counted[:, 1:].sum(1)], dim=1)
    return sums


def _log_probabilities(model: Any, part: Windows, edits: Sequence[tuple[Site, Edit]]) -> Tensor:
    """Return log-probabilities of the next token at each position but the last [windows, length - 1, V]."""
    with ExitStack() as stack:
        for site, edit in edits:
            stack.enter_context(hooked(model, site, edit))
        logits: Tensor = model(part.tokens.to(model.device), use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1).cpu()


def _nats(log_p: Tensor, part: Windows) -> Tensor:
    """Return the loss [windows, length - 1] of each counted token, 0 at the others."""
    return -log_p.gather(-1, part.tokens[:, 1:, None]).squeeze(-1) * part.counted[:, 1:]


@dataclass(frozen=True)
class Splice:
    """Cross-entropy of a model when an SAE's output replaces the vectors at its site, in nats per counted token.

    `ce`: of the model itself; `ce_spliced`: with the SAE; `ce_ablated`: with the mean vector in its place. `kl`: the
    divergence KL(model || spliced model). BOS and what the windows do not count are never replaced.
    """

    ce: float
    ce_spliced: float
    ce_ablated: float
    kl: float

    @property
    def recovered(self) -> float:
        """CE recovered: 1 for a perfect SAE, 0 for one that is no better than the mean vector."""
        return (self.ce_ablated - self.ce_spliced) / (self.ce_ablated - self.ce)


@torch.inference_mode()
def splice(model: Any, site: Site, sae: SAE, mean: Tensor, windows: Windows, output_site: Site | None = None) -> Splice:
    """Splice an SAE in at a site, or a transcoder that reads there and writes at `output_site`; mean [d_out]."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for index in tqdm(windows.passes(WINDOWS_PER_PASS), desc="splice", unit="pass"):
        part = windows.take(index).trimmed()
        counted = part.counted.to(model.device)
        spliced_in = (
            transcoder_edits(site, output_site, sae, counted)
            if output_site
            else [(site, at_counted(lambda x: sae.forward(x)[0], counted))]
        )
        ablated_in = [(output_site or site, at_counted(lambda x: mean.to(x.device).expand_as(x), counted))]
        p, q, ablated = (_log_probabilities(model, part, edits) for edits in ([], spliced_in, ablated_in))
        counted_targets = part.counted[:, 1:]
        kl = (p.exp() * (p - q)).sum(-1) * counted_targets
        sums += torch.stack([*(_nats(log_p, part).sum() for log_p in (p, q, ablated)), kl.sum()]).double()
        count += int(counted_targets.sum())
    return Splice(*(sums / count).tolist())


def transcoder_edits(site: Site, output_site: Site, sae: SAE, counted: Tensor) -> list[tuple[Site, Edit]]:
    """Return edits that replace the vectors at `output_site` by a transcoder's output for those at `site`."""
    read: list[Tensor] = []

    def write(_: Tensor) -> Tensor:
        return sae.forward(read.pop())[0]

    def keep(x: Tensor) -> None:
        read.append(x[:, 1:])

    return [(site, keep), (output_site, at_counted(write, counted))]


def at_counted(edit: Callable[[Tensor], Tensor], counted: Tensor) -> Edit:
    """Return the edit applied at the counted positions [windows, length], the first excepted."""
    mask = counted[:, 1:, None]
    return skip_bos(lambda x: torch.where(mask, edit(x), x))


def by_position(edit: Callable[[Tensor, Tensor], Tensor], counted: Tensor) -> Edit:
    """Return the edit of x [windows, length, d] that is given `counted` [windows, length]."""

    def edited(x: Tensor) -> Tensor:
        require_positions(x)
        return edit(x, counted)

    return edited


def require_positions(x: Tensor) -> None:
    """Raise UserError if x has no dimension of positions."""
    if x.ndim != 3:
        raise UserError("site: its layer flattens the batch, so that BOS cannot be left alone")


def skip_bos(edit: Callable[[Tensor], Tensor | None]) -> Edit:
    """Return the edit applied at every position but the first."""

    def edited(x: Tensor) -> Tensor | None:
        require_positions(x)
        changed = edit(x[:, 1:])
        return None if changed is None else torch.cat([x[:, :1], changed], dim=1)

    return edited
