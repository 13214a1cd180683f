"""How faithful an SAE is, on tokens it was not trained on."""

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
from rudder.sae_models.fidelity import forward
from rudder.sae_models.sae import SAE

WINDOWS_A_PASS = 8
# Activations held at once.
BLOCK = 1 << 25


@dataclass(frozen=True)
class Fidelity:
    """Fraction of variance unexplained, mean active latents a token, share of latents that never fire, shrinkage, and
    the share of tokens on which each latent fires, `frequency` [F].

    Shrinkage is the relative reconstruction bias E||y||^2 / E[y . x] of arXiv 2404.16014, output and target taken from
    the target's mean: below 1 the SAE's outputs are too small.
    """

    fvu: float
    l0: float
    dead_share: float
    shrinkage: float
    frequency: Tensor


@torch.no_grad()
def fidelity(sae: SAE, x: Tensor, target: Tensor | None = None) -> Fidelity:
    """Of inputs [n, d], or [n, L, d] with a router; the target [n, d_out] is the input itself but for a transcoder."""
    active, count = torch.zeros(sae.latents, device=x.device), 0
    error, variance, square, product = torch.zeros(4, dtype=torch.float64, device=x.device)
    mean = (x if target is None else target).flatten(0, -2).mean(0)
    part = max(1, BLOCK // sae.latents)
    for index in tqdm(torch.arange(len(x), device=x.device).split(part), desc="measure", unit="block"):
        latents = sae.encode(x[index])
        y, missing = forward(sae, latents, x[index], None if target is None else target[index])
        active += (latents > 0).sum(0)
        moved, wanted = y - mean, y + missing - mean
        error += missing.square().sum()
        variance += wanted.square().sum()
        square += moved.square().sum()
        product += (moved * wanted).sum()
        count += len(index)
    frequency = active / count
    return Fidelity(
        float(error / variance),
        float(active.sum() / count),
        float((active == 0).float().mean()),
        float(square / product),
        frequency.cpu(),
    )


@torch.no_grad()
def nearest(directions: Tensor) -> Tensor:
    """The largest cosine [F] of each direction of [F, d] with another one: near 1, two latents say the same."""
    unit = functional.normalize(directions.float(), dim=1)
    found = []
    for first, part in enumerate(tqdm(unit.split(1024), desc="cosines", unit="block")):
        cosines = part @ unit.T
        cosines[torch.arange(len(part)), 1024 * first + torch.arange(len(part))] = -1
        found.append(cosines.amax(1))
    return torch.cat(found)


@torch.inference_mode()
def losses(model: Any, windows: Windows, site: Site | None = None, edit: Edit | None = None) -> Tensor:
    """Nats and number of each window's counted tokens [windows, 2]; with the residual stream edited at a site."""
    edits = [] if site is None or edit is None else [(site, edit)]
    rows = []
    for part in tqdm(_parts(windows), desc="loss", unit="pass"):
        nats = _nats(_log_probabilities(model, part, edits), part)
        rows.append(torch.stack([nats.sum(1), part.counted[:, 1:].sum(1)], dim=1))
    return torch.cat(rows)


def _parts(windows: Windows) -> list[Windows]:
    return [windows.take(index) for index in torch.arange(len(windows)).split(WINDOWS_A_PASS)]


def _log_probabilities(model: Any, part: Windows, edits: Sequence[tuple[Site, Edit]]) -> Tensor:
    """Of every token that has a next one [windows, length - 1, V]."""
    with ExitStack() as stack:
        for site, edit in edits:
            stack.enter_context(hooked(model, site, edit))
        logits: Tensor = model(part.tokens.to(model.device), use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1).cpu()


def _nats(log_p: Tensor, part: Windows) -> Tensor:
    """Loss [windows, length - 1] of each counted token, 0 at the others."""
    return -log_p.gather(-1, part.tokens[:, 1:, None]).squeeze(-1) * part.counted[:, 1:]


@dataclass(frozen=True)
class Splice:
    """What a model loses when an SAE's output stands in for the vectors at its site, in nats per counted token.

    `ce` of the model, `ce_spliced` with the SAE, `ce_ablated` with the mean vector in its place; `recovered` is the
    share of the rise under ablation that the SAE saves, `kl` the divergence of the spliced from the model's own
    distribution. BOS stays as it is.
    """

    ce: float
    ce_spliced: float
    ce_ablated: float
    kl: float

    @property
    def recovered(self) -> float:
        """1 for a perfect SAE, 0 for one that is no better than the mean."""
        return (self.ce_ablated - self.ce_spliced) / (self.ce_ablated - self.ce)


@torch.inference_mode()
def splice(model: Any, site: Site, sae: SAE, mean: Tensor, windows: Windows, output_site: Site | None = None) -> Splice:
    """Of an SAE at a site, or of a transcoder that reads there and writes at `output_site`; mean [d_out]."""
    spliced_in = (
        transcoded(site, output_site, sae) if output_site else [(site, behind_bos(lambda x: sae.forward(x)[0]))]
    )
    ablated_in = [(output_site or site, behind_bos(lambda x: mean.to(x.device).expand_as(x)))]
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for part in tqdm(_parts(windows), desc="splice", unit="pass"):
        p, q, ablated = (_log_probabilities(model, part, edits) for edits in ([], spliced_in, ablated_in))
        counted = part.counted[:, 1:]
        kl = (p.exp() * (p - q)).sum(-1) * counted
        sums += torch.stack([*(_nats(log_p, part).sum() for log_p in (p, q, ablated)), kl.sum()]).double()
        count += int(counted.sum())
    return Splice(*(sums / count).tolist())


def transcoded(site: Site, output_site: Site, sae: SAE) -> list[tuple[Site, Edit]]:
    """Edits that put a transcoder's output for the vectors at `site` in the place of those at `output_site`."""
    read: list[Tensor] = []

    def write(_: Tensor) -> Tensor:
        return sae.forward(read.pop())[0]

    def keep(x: Tensor) -> None:
        read.append(x[:, 1:])

    return [(site, keep), (output_site, behind_bos(write))]


def behind_bos(edit: Callable[[Tensor], Tensor | None]) -> Edit:
    """The edit at every position but the first."""

    def edited(x: Tensor) -> Tensor | None:
        if x.ndim != 3:
            raise UserError("site: its layer flattens the batch, so that BOS cannot be left alone")
        changed = edit(x[:, 1:])
        return None if changed is None else torch.cat([x[:, :1], changed], dim=1)

    return edited
