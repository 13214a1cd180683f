"""How faithful an SAE is, on tokens it was not trained on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sae_models.sae import SAE
from sae_models.training.corpus import Windows
from sae_models.training.sites import Edit, Site, hooked

WINDOWS_A_PASS = 8


@dataclass(frozen=True)
class Fidelity:
    """Fraction of variance unexplained, mean active latents a token, share of latents that never fire."""

    fvu: float
    l0: float
    dead_share: float


@torch.no_grad()
def fidelity(sae: SAE, x: Tensor) -> Fidelity:
    """Of residuals [n, d]."""
    active, count = torch.zeros(sae.latents), 0
    error = torch.zeros((), dtype=torch.float64)
    for part in x.split(4096):
        latents = sae.encode(part)
        active += (latents > 0).sum(0)
        error += (part - sae.decode(latents)).square().sum()
        count += len(part)
    variance = (x - x.mean(0)).square().sum()
    return Fidelity(float(error / variance), float(active.sum() / count), float((active == 0).float().mean()))


@torch.inference_mode()
def losses(model: Any, windows: Windows, site: Site | None = None, edit: Edit | None = None) -> Tensor:
    """Nats and number of each window's counted tokens [windows, 2]; with the residual stream edited at a site."""
    rows = []
    for start in range(0, len(windows), WINDOWS_A_PASS):
        part = windows.take(torch.arange(start, min(start + WINDOWS_A_PASS, len(windows))))
        rows.append(_losses(model, part, site, edit))
    return torch.cat(rows)


def _losses(model: Any, part: Windows, site: Site | None, edit: Edit | None) -> Tensor:
    if site is None or edit is None:
        logits = model(part.tokens, use_cache=False).logits
    else:
        with hooked(model, site, edit):
            logits = model(part.tokens, use_cache=False).logits
    nats = functional.cross_entropy(logits[:, :-1].flatten(0, 1), part.tokens[:, 1:].flatten(), reduction="none")
    counted = part.counted[:, 1:]
    return torch.stack([(nats.view_as(counted) * counted).sum(1), counted.sum(1)], dim=1)


def mean_loss(model: Any, windows: Windows, site: Site | None = None, edit: Edit | None = None) -> float:
    """Nats per counted token."""
    total, count = losses(model, windows, site, edit).double().sum(0)
    return float(total / count)


def ce_recovered(model: Any, site: Site, sae: SAE, mean: Tensor, windows: Windows) -> float:
    """Share of the loss of mean ablation at the site that the SAE's reconstruction saves; BOS stays as it is."""
    clean = mean_loss(model, windows)
    spliced = mean_loss(model, windows, site, behind_bos(lambda x: sae.forward(x)[0]))
    ablated = mean_loss(model, windows, site, behind_bos(lambda x: mean.expand_as(x)))
    return (ablated - spliced) / (ablated - clean)


def behind_bos(edit: Edit) -> Edit:
    """The edit at every position but the first."""

    def edited(x: Tensor) -> Tensor | None:
        changed = edit(x[:, 1:])
        return None if changed is None else torch.cat([x[:, :1], changed], dim=1)

    return edited
