"""A run on several processes that `torchrun` started: each trains on a part of every batch, or holds a part of the
latents, or both; together they take the steps that one process would take.

Ranks with the same latents are neighbours of stride `latent_parts`: rank = part of the batch * latent_parts + part of
the latents.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rudder.sae_models.errors import UserError

# The others wait while one process harvests the store.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: which part of the batch, of how many; which part of the latents, of how many.

    What crosses a dimension with one part is what it was.
    """

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

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.batch_parts * self.latent_parts == 1

    def barrier(self) -> None:
        """Waits for all."""
        if not self.alone:
            dist.barrier()

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a batch [n, ...]."""
        return x.chunk(self.batch_parts)[self.batch_part]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """The mean over the parts of the batch, in place; small tensors travel together."""
        if self.batch_parts == 1:
            return
        held = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in held])
        dist.all_reduce(flat, group=self.batch_group)
        flat /= self.batch_parts
        for tensor, mean in zip(held, flat.split([tensor.numel() for tensor in held]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the parts of the batch. A gradient passes as it is: gradients are averaged later."""
        if self.batch_parts == 1:
            return tensor
        mean: Tensor = _Reduced.apply(tensor, lambda t: self.average([t]))  # type: ignore[no-untyped-call]
        return mean

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of the latents. All go on with all of it, so a gradient passes as it is."""
        if self.latent_parts == 1:
            return tensor
        summed: Tensor = _Reduced.apply(tensor, self.add_up)  # type: ignore[no-untyped-call]
        return summed

    def add_up(self, tensor: Tensor) -> None:
        """The sum over the parts of the latents, in place."""
        dist.all_reduce(tensor, group=self.latent_group)

    def spread(self, tensor: Tensor) -> Tensor:
        """A tensor that all parts of the latents have, for each to read with its own: its gradient is of all."""
        given: Tensor = _Spread.apply(tensor, self) if self.latent_parts > 1 else tensor  # type: ignore[no-untyped-call]
        return given

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors [n, m] of the parts of the latents, side by side."""
        return tensor if self.latent_parts == 1 else torch.cat(self.gathered(tensor), dim=1)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The same tensor of each part of the latents."""
        parts = [torch.empty_like(tensor) for _ in range(self.latent_parts)]
        dist.all_gather(parts, tensor.contiguous(), group=self.latent_group)
        return parts

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def least(self, tensor: Tensor) -> Tensor:
        """The least over all processes."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return tensor
        reduced = tensor.detach().clone()
        dist.all_reduce(reduced, operation)
        return reduced


ALONE = Mesh()


class _Reduced(torch.autograd.Function):
    """What `reduce` makes of a copy in place; a gradient passes as it is."""

    @staticmethod
    def forward(_: Any, t: Tensor, reduce: Callable[[Tensor], object]) -> Tensor:
        reduced = t.detach().clone()
        reduce(reduced)
        return reduced

    @staticmethod
    def backward(_: Any, g: Tensor) -> Any:
        return g, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        summed = g.clone()
        ctx.mesh.add_up(summed)
        return summed, None


def join(latent_parts: int, batch: int) -> Mesh:
    """The mesh that the environment of `torchrun` describes; alone without one. ValueError: the parts do not fit."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks % latent_parts:
        raise UserError(f"latent_ranks: {latent_parts} does not divide the {ranks} processes")
    batch_parts = ranks // latent_parts
    if batch % batch_parts:
        raise UserError(f"batch: {batch} is not divided by {batch_parts} processes")
    if ranks == 1:
        return ALONE
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
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
