"""Triton implementations of `kernels.row_sums` and `kernels.row_dots`. The only module that imports Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 256


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _sums(rows, index, end, weight, out, d, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum one group over one block of columns. One program loops over all pairs of its group: no atomics, and a
    frequent latent delays no other.
    """
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < d
    first = tl.where(group == 0, 0, tl.load(end + group - 1, mask=group > 0, other=0))
    total = tl.zeros([columns], dtype=tl.float32)
    for i in range(first, tl.load(end + group)):
        row = tl.load(rows + tl.load(index + i) * d + column, mask=inside, other=0.0)
        total += tl.load(weight + i) * row.to(tl.float32)
    tl.store(out + group * d + column, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _dots(left, right, group, index, out, d, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute the dot product of one pair."""
    pair = tl.program_id(0).to(tl.int64)
    a, b = left + tl.load(group + pair) * d, right + tl.load(index + pair) * d
    total = tl.zeros([columns], dtype=tl.float32)
    for first in range(0, d, columns):
        column = first + tl.arange(0, columns)
        inside = column < d
        left_values = tl.load(a + column, mask=inside, other=0.0).to(tl.float32)
        total += left_values * tl.load(b + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pair, tl.sum(total, 0))


def row_sums(rows: Tensor, index: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """See `kernels.row_sums`; all tensors on one device."""
    d = rows.shape[1]
    out = torch.empty(len(start), d, dtype=torch.float32, device=rows.device)
    end = torch.cat([start[1:], start.new_tensor([len(index)])])
    if len(start):
        _sums[(len(start), triton.cdiv(d, COLUMNS))](rows.contiguous(), index, end, weight, out, d, COLUMNS)
    return out


def row_dots(left: Tensor, right: Tensor, group: Tensor, index: Tensor) -> Tensor:
    """See `kernels.row_dots`; all tensors on one device."""
    out = torch.empty(len(index), dtype=torch.float32, device=left.device)
    if len(index):
        _dots[(len(index),)](left.contiguous(), right.contiguous(), group, index, out, left.shape[1], COLUMNS)
    return out
