"""The two kernels of sparse training, over m pairs of a group and a matrix row index. On a GPU each is one Triton
kernel.
"""

import torch
from torch import Tensor
from torch.nn import functional

SUM_MODE = 0


def row_sums(rows: Tensor, index: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """Return weighted sums [groups, d] of rows [r, d]: group g sums weight[i] * rows[index[i]] over start[g] <= i <
    start[g + 1].

    index [m], weight [m], start [groups]; a group may be empty.
    """
    if rows.is_cuda:
        from rudder.sae_models.sparse import triton_kernels

        return triton_kernels.row_sums(rows, index, start, weight)
    sums: Tensor = functional.embedding_bag(index, rows, start, mode="sum", per_sample_weights=weight)
    return sums


def row_dots(left: Tensor, right: Tensor, group: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """Return left[group] . right[index], [m], for left [groups, d] and right [r, d]; `start` [groups] as in
    `row_sums`.
    """
    if left.is_cuda:
        from rudder.sae_models.sparse import triton_kernels

        return triton_kernels.row_dots(left, right, group, index)
    # The backward of embedding_bag with respect to its weights computes these dot products without materialising
    # left[group] and right[index], [m, d] each.
    per_sample_weights_backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    dots: Tensor = per_sample_weights_backward(left, right, index, start, group, SUM_MODE, -1)
    return dots
