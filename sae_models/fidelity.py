"""FVU, L0 and the other measures of an SAE's fidelity: the one place that defines them.

    L0  = mean number of active latents per token
    FVU = sum ||t - y||^2 / sum ||t - mean(t)||^2          fraction of variance unexplained

y is the SAE's output and t its target: the input itself, or for a transcoder the vectors at the site that it writes.
Whoever reports FVU or L0 measures them here. (The reconstruction loss of a training step is its squared error relative
to the variance of a sample, which approximates the FVU of the batch.) All sums are float64 and accumulate over chunks
of tokens, so memory is bounded whatever the number of tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.sae import SAE

# Cap on activations held at a time: 16 MB in float32. Each chunk converts a half-precision dictionary once.
ACTIVATIONS_PER_CHUNK = 1 << 22
# Latents active on more than this share of tokens are dense: few of them mean anything.
DENSE = 0.1
FREQUENT = 0.01


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class Fidelity:
    """Sums over tokens from which the measures follow.

    `active` [F]: number of tokens on which each latent is active. The other sums compare outputs with targets:
    squared norms, the inner product of output and target, and the sums of both [d_out]. `compared` is False until
    outputs are added, which never happens for a partial SAE.
    """

    tokens: int = 0
    active: Tensor = field(default_factory=_zero)
    compared: bool = False
    error_square: float = 0.0
    target_square: float = 0.0
    output_square: float = 0.0
    product: float = 0.0
    target_sum: Tensor = field(default_factory=_zero)
    output_sum: Tensor = field(default_factory=_zero)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return float(self.active.sum()) / self.tokens

    @property
    def frequency(self) -> Tensor:
        """Share of tokens on which each latent is active [F], float32 on the CPU."""
        return (self.active / self.tokens).float().cpu()

    @property
    def dead_share(self) -> float:
        """Share of latents that are active on no token."""
        return float((self.active == 0).double().mean())

    def dense_latents(self, frequency: float) -> int:
        """Number of latents that are active on more than this share of all tokens."""
        return int((self.active > frequency * self.tokens).sum())

    def dense_share(self, frequency: float) -> float:
        """Share of all activations that latents carry which are active on more than this share of tokens; 0 of none."""
        active = self.active.double()
        total = float(active.sum())
        return float(active[active > frequency * self.tokens].sum()) / total if total else 0.0

    @property
    def fvu(self) -> float:
        """Fraction of the target's variance unexplained; infinite where the target does not vary or is unknown."""
        if not self.compared:
            return float("inf")
        variance = self.target_square - float(self.target_sum.square().sum()) / self.tokens
        return self.error_square / variance if variance > 0 else float("inf")

    @property
    def shrinkage(self) -> float:
        """Relative reconstruction bias E||y||^2 / E[y . t] (arXiv 2404.16014), y and t relative to the mean of t.

        Below 1 the outputs are too small; NaN where outputs and targets are uncorrelated.
        """
        mean = self.target_sum / self.tokens
        shift = float((mean * self.output_sum).sum())
        square = self.output_square - 2 * shift + float((mean * self.target_sum).sum())
        product = self.product - shift
        return square / product if product else float("nan")

    def add_latents(self, latents: Tensor) -> None:
        """Add activations [n, F]."""
        self.tokens += len(latents)
        self.active = self.active + (latents != 0).sum(0)

    def add_outputs(self, output: Tensor, error: Tensor) -> None:
        """Add outputs [n, d_out] and errors [n, d_out] (target - output) of tokens that `add_latents` counts."""
        output, error = output.double(), error.double()
        target = output + error
        self.compared = True
        self.error_square += float(error.square().sum())
        self.target_square += float(target.square().sum())
        self.output_square += float(output.square().sum())
        self.product += float((output * target).sum())
        self.target_sum = self.target_sum + target.sum(0)
        self.output_sum = self.output_sum + output.sum(0)

    @torch.no_grad()
    def update(self, sae: SAE, latents: Tensor, x: Tensor, target: Tensor | None = None) -> None:
        """Add activations [n, F] of inputs x [n, d], with a router [n, L, d]; target [n, d_out] of a transcoder."""
        self.add_latents(latents)
        if not sae.partial:
            self.add_outputs(*_forward(sae, latents, x, target))


def measure(sae: SAE, x: Tensor, target: Tensor | None = None, progress: bool = False) -> Fidelity:
    """Measure an SAE on inputs x [n, d], with a router [n, L, d]; target [n, d_out] of a transcoder."""
    sums = Fidelity()
    with tqdm(total=len(x), unit="token", unit_scale=True, desc="measure", disable=not progress) as bar:
        for part, wanted in chunks(sae, x, target):
            sums.update(sae, sae.encode(part), part, wanted)
            bar.update(len(part))
    return sums


@torch.no_grad()
def fvu(target: Tensor, output: Tensor) -> float:
    """FVU of outputs [n, d_out] for targets [n, d_out]."""
    sums = Fidelity(tokens=len(target))
    sums.add_outputs(output, target.double() - output.double())
    return sums.fvu


@torch.no_grad()
def l0(latents: Tensor) -> float:
    """L0 of activations [..., F]."""
    sums = Fidelity()
    sums.add_latents(latents.flatten(0, -2))
    return sums.l0


def chunks(sae: SAE, x: Tensor, target: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield inputs and targets in chunks small enough to hold the activations of all latents."""
    size = max(1, ACTIVATIONS_PER_CHUNK // sae.latents)
    for start in range(0, len(x), size):
        yield x[start : start + size], None if target is None else target[start : start + size]


def encode_in_chunks(sae: SAE, x: Tensor) -> Tensor:
    """Return activations [n, F] of inputs x, computed chunk by chunk."""
    return torch.cat([sae.encode(part) for part, _ in chunks(sae, x)])


def _forward(sae: SAE, latents: Tensor, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (output, error) like SAE.forward; reuse the activations unless a router needs the full forward pass."""
    if sae.router is not None:
        return sae.forward(x, target)
    output = sae.decode(latents, x)
    return output, (x if target is None else target).float() - output
