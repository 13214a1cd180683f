"""A run on several processes that `torchrun` started: each trains on a part of every batch, or holds a part of the
latents, or both.

Ranks with the same latents are neighbours of stride `latent_ranks`: rank = part of the batch * latent_ranks + part of
the latents.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sae_models.architectures.architecture import Architecture, Shards, shard

# The others wait while one process harvests the store.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: which part of the batch, of how many; which part of the latents, of how many."""

    batch_part: int = 0
    batch_parts: int = 1
    latent_part: int = 0
    latent_parts: int = 1
    batch_group: Any = None
    latent_group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""
        return self.batch_part == self.latent_part == 0

    def barrier(self) -> None:
        """Waits for all."""
        if self.batch_parts * self.latent_parts > 1:
            dist.barrier()

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a batch [n, ...]."""
        return x.chunk(self.batch_parts)[self.batch_part]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """The mean over the parts of the batch, in place; small tensors travel together."""
        held = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in held])
        dist.all_reduce(flat, group=self.batch_group)
        flat /= self.batch_parts
        for tensor, mean in zip(held, flat.split([tensor.numel() for tensor in held]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of the latents."""
        summed = tensor.detach().clone()
        dist.all_reduce(summed, group=self.latent_group)
        return summed

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors [n, m] of the parts of the latents, side by side."""
        return torch.cat(self.gathered(tensor), dim=1)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The same tensor of each part of the latents, which may differ in length."""
        lengths = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(self.latent_parts)]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device), group=self.latent_group)
        parts = [tensor.new_empty((int(length), *tensor.shape[1:])) for length in lengths]
        dist.all_gather(parts, tensor.contiguous(), group=self.latent_group)
        return parts


def join(latent_parts: int, batch: int) -> Mesh:
    """The mesh that the environment of `torchrun` describes; alone without one. ValueError: the parts do not fit."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks % latent_parts:
        raise ValueError(f"latent_ranks: {latent_parts} does not divide the {ranks} processes")
    batch_parts = ranks // latent_parts
    if batch % batch_parts:
        raise ValueError(f"batch: {batch} is not divided by {batch_parts} processes")
    if ranks == 1:
        return Mesh()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    table = torch.arange(ranks).view(batch_parts, latent_parts)
    # Every process makes every group, in one order.
    latent_groups = [dist.new_group(row.tolist()) for row in table]
    batch_groups = [dist.new_group(column.tolist()) for column in table.T]
    b, f = divmod(rank, latent_parts)
    return Mesh(b, batch_parts, f, latent_parts, batch_groups[f], latent_groups[b])


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sharded(architecture: Architecture, mesh: Mesh) -> Architecture:
    """This process's part of the latents."""
    if mesh.latent_parts == 1:
        return architecture
    return shard(architecture, mesh.latent_part, mesh.latent_parts, Shards(mesh.total, mesh.gather))


def whole(part: Architecture, template: Architecture, mesh: Mesh) -> Architecture:
    """The architecture of which every process holds a part, in `template`: one that was made with the same config."""
    if mesh.latent_parts == 1:
        return part
    state = part.state_dict()
    joined = {name: t if name in part.SHARED else torch.cat(mesh.gathered(t)) for name, t in state.items()}
    template.load_state_dict(joined)
    return template
