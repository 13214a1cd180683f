"""Data and tensor parallelism over the processes that `torchrun` started: each process trains on a part of every batch,
holds a part of the latents, or both, and together they compute the steps that a single process would.

rank = batch_part * latent_parts + latent_part: the ranks that share a part of the batch are consecutive.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Long enough for the other processes to wait while the leader harvests the store.
from rudder.sae_models.errors import UserError

TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Mesh:
    """Position of this process in a 2D mesh of batch parts and latent parts, and its process groups.

    Methods are named after the operation of torch.distributed; `batch_` and `latent_` say over which group it runs, and
    a trailing underscore that it works in place. Over a group of one process every operation is the identity.
    """

    batch_part: int = 0
    batch_parts: int = 1
    latent_part: int = 0
    latent_parts: int = 1
    batch_group: Any = None
    latent_group: Any = None

    @property
    def is_leader(self) -> bool:
        """Return whether this process writes files and logs for all."""
        return self.batch_part == self.latent_part == 0

    @property
    def is_single_process(self) -> bool:
        """Return whether there is no other process."""
        return self.batch_parts * self.latent_parts == 1

    def barrier(self) -> None:
        """Wait for all processes."""
        if not self.is_single_process:
            dist.barrier()

    def local_batch(self, x: Tensor) -> Tensor:
        """Return this process's part of a batch [n, ...]."""
        return x.chunk(self.batch_parts)[self.batch_part]

    def batch_all_reduce_mean_(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over the parts of the batch, in place. They are flattened into one buffer: one collective
        instead of many small ones.
        """
        if self.batch_parts == 1:
            return
        items = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in items])
        dist.all_reduce(flat, group=self.batch_group)
        flat /= self.batch_parts
        for tensor, mean in zip(items, flat.split([tensor.numel() for tensor in items]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def batch_all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the parts of the batch. Its backward is the identity: gradients are averaged after the
        backward pass.
        """
        if self.batch_parts == 1:
            return tensor
        mean: Tensor = _AllReduce.apply(tensor, lambda t: self.batch_all_reduce_mean_([t]))  # type: ignore[no-untyped-call]
        return mean

    def latent_all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the parts of the latents. Every rank continues with the whole sum, so its backward is the
        identity.
        """
        if self.latent_parts == 1:
            return tensor
        summed: Tensor = _AllReduce.apply(tensor, self.latent_all_reduce_sum_)  # type: ignore[no-untyped-call]
        return summed

    def latent_all_reduce_sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over the parts of the latents, in place."""
        dist.all_reduce(tensor, group=self.latent_group)

    def latent_copy(self, tensor: Tensor) -> Tensor:
        """Return a replicated tensor for each part of the latents to read; the backward sums the gradients of all parts
        (the operator f of Megatron-LM, arXiv 1909.08053).
        """
        copied: Tensor = _CopyToRanks.apply(tensor, self) if self.latent_parts > 1 else tensor  # type: ignore[no-untyped-call]
        return copied

    def latent_all_gather_columns(self, tensor: Tensor) -> Tensor:
        """Concatenate tensors [n, m] of all parts of the latents to [n, latent_parts * m]."""
        return tensor if self.latent_parts == 1 else torch.cat(self.latent_all_gather(tensor), dim=1)

    def latent_all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all parts of the latents, in order."""
        parts = [torch.empty_like(tensor) for _ in range(self.latent_parts)]
        dist.all_gather(parts, tensor.contiguous(), group=self.latent_group)
        return parts

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, detached."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_min(self, tensor: Tensor) -> Tensor:
        """Return the minimum over all processes, detached."""
        return self._all_reduce(tensor, dist.ReduceOp.MIN)

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.is_single_process:
            return tensor
        reduced = tensor.detach().clone()
        dist.all_reduce(reduced, operation)
        return reduced


SINGLE_PROCESS = Mesh()


class _AllReduce(torch.autograd.Function):
    """Apply an in-place reduction to a copy in the forward pass; the backward is the identity."""

    @staticmethod
    def forward(_: Any, t: Tensor, reduce: Callable[[Tensor], object]) -> Tensor:
        reduced = t.detach().clone()
        reduce(reduced)
        return reduced

    @staticmethod
    def backward(_: Any, g: Tensor) -> Any:
        return g, None


class _CopyToRanks(torch.autograd.Function):
    """Identity in the forward pass; all-reduce (sum) over the parts of the latents in the backward pass."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        summed = g.clone()
        ctx.mesh.latent_all_reduce_sum_(summed)
        return summed, None


def init_mesh(latent_parts: int, batch: int) -> Mesh:
    """Initialise the process group from the environment variables of `torchrun` and return the mesh, or SINGLE_PROCESS
    without them. Raise ValueError if the number of processes, latent parts and batch size do not divide.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks % latent_parts:
        raise UserError(f"latent_ranks: {latent_parts} does not divide the {ranks} processes")
    batch_parts = ranks // latent_parts
    if batch % batch_parts:
        raise UserError(f"batch: {batch} is not divided by {batch_parts} processes")
    if ranks == 1:
        return SINGLE_PROCESS
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    table = torch.arange(ranks).view(batch_parts, latent_parts)
    # new_group is collective: every process must create every group, in the same order.
    latent_groups = [dist.new_group(same_batch_part.tolist()) for same_batch_part in table]
    batch_groups = [dist.new_group(same_latent_part.tolist()) for same_latent_part in table.T]
    batch_part, latent_part = divmod(rank, latent_parts)
    groups = batch_groups[latent_part], latent_groups[batch_part]
    return Mesh(batch_part, batch_parts, latent_part, latent_parts, *groups)


def destroy_mesh() -> None:
    """Destroy the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
