"""The two operations of sparse training, over m pairs of a group and a row; on a GPU in one Triton kernel each."""

import torch
from torch import Tensor
from torch.nn import functional

SUM_MODE = 0


def row_sums(rows: Tensor, index: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums [groups, d] of rows [r, d]: group g sums weight * rows[index] over start[g] <= i < start[g + 1].

    index [m], weight [m], start [groups]; a group may be empty.
    """
    if rows.is_cuda:
        from rudder.sae_models.sparse import triton_kernels

        return triton_kernels.row_sums(rows, index, start, weight)
    sums: Tensor = functional.embedding_bag(index, rows, start, mode="sum", per_sample_weights=weight)
    return sums


def row_dots(left: Tensor, right: Tensor, group: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """left[group] . right[index], [m], of left [groups, d] and right [r, d]; `start` [groups] as in `row_sums`."""
    if left.is_cuda:
        from rudder.sae_models.sparse import triton_kernels

        return triton_kernels.row_dots(left, right, group, index)
    # The gradient of embedding_bag's weights, which on a CPU gathers no rows.
    of_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward
    dots: Tensor = of_weights(left, right, index, start, group, SUM_MODE, -1)
    return dots
