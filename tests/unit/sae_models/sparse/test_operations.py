"""Sparse operations equal their dense counterparts: selection, values, gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.kernels import row_dots, row_sums
from rudder.sae_models.sparse.operations import EncoderWeights, Pairs

ROOT = Path(__file__).parents[4]


def random_parameter(seed: int, *shape: int) -> Tensor:
    """Return normal numbers that require a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def problem(seed: int, n: int, d: int, latents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, encoder, bias, and a decoder of unit vectors."""
    decoder = torch.nn.functional.normalize(random_parameter(seed + 3, latents, d).detach(), dim=1).requires_grad_()
    return (
        random_parameter(seed, n, d),
        random_parameter(seed + 1, latents, d),
        random_parameter(seed + 2, latents),
        decoder,
    )


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Return the gradient of each leaf."""
    return torch.autograd.grad(loss, leaves)


def nonuniform_loss(y: Tensor) -> Tensor:
    """A loss whose gradient differs at every element."""
    return (y * torch.linspace(-1, 2, y.numel()).view_as(y) + y.square()).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12), st.sampled_from([7, 64, 96, 256]), st.data())
def test_gradients_of_a_topk_step_equal_those_of_dense_autograd(
    seed: int, n: int, d: int, latents: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(7, latents)))
    leaves = x, encoder, bias, decoder = problem(seed, n, d, latents)
    z, active = sparse.top_k(x, EncoderWeights(encoder, bias, torch.float32), k)
    sparse_output = active.decode(z.relu(), decoder)
    full = x @ encoder.T + bias
    top = full.topk(k, dim=1)
    dense_output = torch.zeros_like(full).scatter(1, top.indices, top.values.relu()) @ decoder
    assert torch.allclose(sparse_output, dense_output, atol=1e-4)
    for sparse_gradient, dense_gradient in zip(
        gradients(nonuniform_loss(sparse_output), *leaves),
        gradients(nonuniform_loss(dense_output), *leaves),
        strict=True,
    ):
        assert float((sparse_gradient - dense_gradient).abs().max()) <= 1e-5 * max(
            1.0, float(dense_gradient.abs().max())
        )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([7, 64, 96]), st.floats(0.5, 3))
def test_pairs_above_a_floor_equal_those_of_a_dense_comparison(seed: int, n: int, latents: int, floor: float) -> None:
    x, encoder, bias, decoder = problem(seed, n, 3, latents)
    floors = floor + torch.rand(latents, generator=torch.Generator().manual_seed(seed))
    full = x @ encoder.T + bias
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "DENSE_SHARE", 1.0)
        pairs = sparse.above_floor(x, EncoderWeights(encoder, bias, torch.float32), floors)
    assert pairs is not None
    expected = full * (full > floors)
    assert torch.allclose(pairs.active.decode(pairs.z, decoder), expected @ decoder, atol=1e-4)
    assert len(pairs.z) == int((full > floors).sum())


def test_many_active_pairs_fall_back_to_dense() -> None:
    x, encoder, bias, _ = problem(0, 8, 3, 64)
    weights = EncoderWeights(encoder, bias, torch.float32)
    assert sparse.above_floor(x, weights, torch.zeros(())) is None
    z, active = sparse.active_preactivations(x, weights)
    assert isinstance(active, sparse.Dense)
    assert torch.allclose(z, x @ encoder.T + bias, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("latents", [2048, 2050])
def test_block_top_k_is_exact(precision: torch.dtype, latents: int) -> None:
    z = random_parameter(0, 16, latents).detach().to(precision)
    values, index = sparse.block_top_k(z, 8)
    assert torch.equal(values.sort(1, descending=True).values, z.topk(8, dim=1).values)
    assert torch.equal(z.gather(1, index), values)
    token, latent, positive = sparse.positive_entries(z - 2)
    assert torch.equal((z - 2)[token, latent], positive)
    assert len(positive) == int((z > 2).sum())
    assert token.tolist() == sorted(token.tolist())


def test_token_with_fewer_than_k_positives_returns_all_of_them() -> None:
    z = -torch.rand(3, 2048)
    z[0, 5], z[0, 2000], z[2, 7] = 1.0, 2.0, 3.0
    values, index = sparse.block_top_k(z, 4)
    assert [
        sorted(i for i, v in zip(*row, strict=True) if v > 0)
        for row in zip(index.tolist(), values.tolist(), strict=True)
    ] == [
        [5, 2000],
        [],
        [7],
    ]


def test_unit_decoder_gradient_has_no_radial_part() -> None:
    x, encoder, bias, decoder = problem(1, 9, 5, 64)
    weights = EncoderWeights(encoder, bias, torch.float32)
    pairs, everything = sparse.top_k(x, weights, 4), sparse.dense_preactivations(x, weights)
    dense_values = torch.zeros(9, 64).index_put((pairs.active.token, pairs.active.latent), pairs.z)  # type: ignore[union-attr]
    for values, active in ((pairs.z, pairs.active), (dense_values, everything.active)):
        (plain,) = gradients(nonuniform_loss(active.decode(values, decoder)), decoder)
        (tangent,) = gradients(nonuniform_loss(active.decode(values, decoder, unit=True)), decoder)
        radial = (plain * decoder).sum(1, keepdim=True) * decoder
        assert radial.abs().max().item() > 0.1
        assert torch.allclose(tangent, plain - radial, atol=1e-4)


def test_row_sums_and_row_dots() -> None:
    rows, left = random_parameter(0, 6, 4).detach(), random_parameter(1, 3, 4).detach()
    index, group, start = torch.tensor([5, 0, 5, 2]), torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2, 2])
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = torch.stack([rows[5] - 2 * rows[0], torch.zeros(4), 0.5 * rows[5] + 3 * rows[2]])
    assert torch.allclose(row_sums(rows, index, start, weight), expected, atol=1e-6)
    assert torch.allclose(row_dots(left, rows, group, index, start), (left[group] * rows[index]).sum(1), atol=1e-6)


GPU_KERNELS = """
import torch
from rudder.sae_models.sparse import kernels, triton_kernels
torch.manual_seed(0)
rows, left, weight = torch.randn(7, 300), torch.randn(5, 300), torch.randn(6)
index, group, start = torch.tensor([6, 0, 6, 2, 1, 1]), torch.tensor([0, 0, 2, 3, 3, 3]), torch.tensor([0, 2, 2, 3, 6])
sums, dots = triton_kernels.row_sums(rows, index, start, weight), triton_kernels.row_dots(left, rows, group, index)
assert torch.allclose(sums, kernels.row_sums(rows, index, start, weight), atol=1e-5)
assert torch.allclose(dots, kernels.row_dots(left, rows, group, index, start), atol=1e-4)
print("equal")
"""


def test_triton_kernels_equal_the_cpu_kernels() -> None:
    """Run in a subprocess with Triton's interpreter, which must be enabled before import; no GPU is needed."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", GPU_KERNELS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_pairs_sorted_by_latent() -> None:
    pairs = Pairs(torch.tensor([0, 0, 1, 3]), torch.tensor([4, 1, 4, 0]), 4, 6)
    assert pairs.start.tolist() == [0, 2, 3, 3]
    assert pairs.latent[pairs.by_latent.order].tolist() == [0, 1, 4, 4]
    assert pairs.by_latent.start.tolist() == [0, 1, 2, 2, 2, 4]
    assert pairs.sum_over_tokens(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [4, 2, 0, 0, 4, 0]
    assert pairs.where(torch.tensor([True, False, True, False])).latent.tolist() == [4, 4]
