"""Trains a BatchTopK SAE (arXiv 2412.06410) on a stream of residuals, with the auxiliary loss of arXiv 2406.04093."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from sae_models.architectures.batch_topk import BatchTopK
from sae_models.sae import SAE


@dataclass(frozen=True)
class Config:
    """What a training run is made of; `tokens` are those seen, with repetition."""

    latents: int
    k: int
    tokens: int
    seed: int = 0
    batch: int = 512
    learning_rate: float = 4e-3
    warm_up: float = 0.02
    decay: float = 0.5
    auxiliary_k: int = 64
    auxiliary_weight: float = 1 / 32
    dead_after: int = 200_000
    threshold_batches: int = 100


def train(batches: Iterable[Tensor], sample: Tensor, config: Config) -> SAE:
    """The canonical SAE of batches of residuals [batch, d]; `sample` [n, d] sets scale, offset and threshold."""
    generator = torch.Generator().manual_seed(config.seed)
    scale = float((sample.shape[1] / sample.square().sum(1).mean()).sqrt())
    sae = BatchTopK(sample.shape[1], config.latents, config.k, generator)
    with torch.no_grad():
        sae.decoder_bias.copy_(sample.mean(0) * scale)
    optimiser = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: rate(step * config.batch / config.tokens, config)
    )
    silent = torch.zeros(config.latents)
    with tqdm(total=config.tokens, unit="tok", unit_scale=True, desc="train") as progress:
        for x in islice(batches, config.tokens // config.batch):
            loss = step(sae, x * scale, silent, config)
            optimiser.step()
            schedule.step()
            sae.normalise_decoder()
            progress.update(len(x))
            progress.set_postfix(fvu=f"{loss:.4f}", dead=int((silent > config.dead_after).sum()), refresh=False)
    return sae.canonical(estimate_threshold(sae, sample * scale, config), scale)


def rate(progress: float, config: Config) -> float:
    """Share of the learning rate at a share of the run: linear warm-up, constant, linear decay to zero."""
    return min(1.0, (progress + 1e-6) / config.warm_up, max(0.0, 1 - progress) / config.decay)


def step(sae: BatchTopK, x: Tensor, silent: Tensor, config: Config) -> float:
    """Gradients of one batch [n, d], and its FVU; `silent` [F], tokens since a latent fired, is brought up to date."""
    sae.zero_grad(set_to_none=True)
    output = sae(x)
    error = x - output.reconstruction
    variance = (x - x.mean(0)).square().sum()
    unexplained = error.square().sum() / variance
    fired = (output.latents.detach() > 0).any(0)
    silent += len(x)
    silent[fired] = 0
    auxiliary = auxiliary_loss(sae, x, error.detach(), silent > config.dead_after, config.auxiliary_k)
    (unexplained + config.auxiliary_weight * auxiliary).backward()
    remove_radial_gradient(sae)
    return float(unexplained.detach())


def auxiliary_loss(sae: BatchTopK, x: Tensor, error: Tensor, dead: Tensor, k: int) -> Tensor:
    """Share of the error [n, d] that the k strongest dead latents of each token leave: it calls dead latents back."""
    if not dead.any():
        return x.new_zeros(())
    z = torch.nn.functional.linear(x - sae.decoder_bias, sae.encoder[dead], sae.bias[dead])
    top = z.topk(min(k, z.shape[1]), dim=1)
    latents = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
    return (error - latents @ sae.decoder[dead]).square().sum() / error.square().sum()


@torch.no_grad()
def remove_radial_gradient(sae: BatchTopK) -> None:
    """Takes out the part of the decoder's gradient that normalisation would undo, so that Adam does not count it."""
    gradient = sae.decoder.grad
    if gradient is not None:
        gradient.sub_((gradient * sae.decoder).sum(1, keepdim=True) * sae.decoder)


@torch.no_grad()
def estimate_threshold(sae: BatchTopK, x: Tensor, config: Config) -> float:
    """The smallest activation kept, averaged over batches of x [n, d]: what stands in for the batch at inference."""
    parts = x.split(config.batch)[: config.threshold_batches]
    return float(torch.stack([sae(part).threshold for part in parts]).mean())
