"""The sparse step is the dense one: the same choice, the same values, the same gradients."""

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
from rudder.sae_models.sparse.operations import Pairs, Weights

ROOT = Path(__file__).parents[4]


def random(seed: int, *shape: int) -> Tensor:
    """Normal numbers that want a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def problem(seed: int, n: int, d: int, latents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, encoder, bias, decoder of unit rows."""
    decoder = torch.nn.functional.normalize(random(seed + 3, latents, d).detach(), dim=1).requires_grad_()
    return random(seed, n, d), random(seed + 1, latents, d), random(seed + 2, latents), decoder


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Of each leaf."""
    return torch.autograd.grad(loss, leaves)


def cost(y: Tensor) -> Tensor:
    """A loss whose gradient differs at every place."""
    return (y * torch.linspace(-1, 2, y.numel()).view_as(y) + y.square()).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12), st.sampled_from([7, 64, 96, 256]), st.data())
def test_gradients_of_a_topk_step_equal_those_of_dense_autograd(
    seed: int, n: int, d: int, latents: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(7, latents)))
    leaves = x, encoder, bias, decoder = problem(seed, n, d, latents)
    z, active = sparse.strongest(x, Weights(encoder, bias, torch.float32), k)
    ours = active.decode(z.relu(), decoder)
    full = x @ encoder.T + bias
    top = full.topk(k, dim=1)
    theirs = torch.zeros_like(full).scatter(1, top.indices, top.values.relu()) @ decoder
    assert torch.allclose(ours, theirs, atol=1e-4)
    for mine, dense in zip(gradients(cost(ours), *leaves), gradients(cost(theirs), *leaves), strict=True):
        assert float((mine - dense).abs().max()) <= 1e-5 * max(1.0, float(dense.abs().max()))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([7, 64, 96]), st.floats(0.5, 3))
def test_pairs_above_a_floor_equal_those_of_a_dense_comparison(seed: int, n: int, latents: int, floor: float) -> None:
    x, encoder, bias, decoder = problem(seed, n, 3, latents)
    floors = floor + torch.rand(latents, generator=torch.Generator().manual_seed(seed))
    full = x @ encoder.T + bias
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "DENSE_SHARE", 1.0)
        found = sparse.above(x, Weights(encoder, bias, torch.float32), floors)
    assert found is not None
    kept = full * (full > floors)
    assert torch.allclose(found.active.decode(found.z, decoder), kept @ decoder, atol=1e-4)
    assert len(found.z) == int((full > floors).sum())


def test_many_active_pairs_are_not_listed() -> None:
    x, encoder, bias, _ = problem(0, 8, 3, 64)
    weights = Weights(encoder, bias, torch.float32)
    assert sparse.above(x, weights, torch.zeros(())) is None
    z, active = sparse.positives(x, weights)
    assert isinstance(active, sparse.Dense)
    assert torch.allclose(z, x @ encoder.T + bias, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("latents", [2048, 2050])
def test_the_largest_of_a_row_are_found_exactly(precision: torch.dtype, latents: int) -> None:
    z = random(0, 16, latents).detach().to(precision)
    values, index = sparse.top(z, 8)
    assert torch.equal(values.sort(1, descending=True).values, z.topk(8, dim=1).values)
    assert torch.equal(z.gather(1, index), values)
    row, column, positive = sparse.positive(z - 2)
    assert torch.equal((z - 2)[row, column], positive)
    assert len(positive) == int((z > 2).sum())
    assert row.tolist() == sorted(row.tolist())


def test_a_row_with_fewer_positives_than_k_gives_all_of_them() -> None:
    z = -torch.rand(3, 2048)
    z[0, 5], z[0, 2000], z[2, 7] = 1.0, 2.0, 3.0
    values, index = sparse.top(z, 4)
    assert [
        sorted(i for i, v in zip(*row, strict=True) if v > 0)
        for row in zip(index.tolist(), values.tolist(), strict=True)
    ] == [
        [5, 2000],
        [],
        [7],
    ]


def test_gradients_on_the_sphere_have_nothing_along_a_row() -> None:
    x, encoder, bias, decoder = problem(1, 9, 5, 64)
    weights = Weights(encoder, bias, torch.float32)
    pairs, everything = sparse.strongest(x, weights, 4), sparse.dense(x, weights)
    dense_values = torch.zeros(9, 64).index_put((pairs.active.token, pairs.active.latent), pairs.z)  # type: ignore[union-attr]
    for values, active in ((pairs.z, pairs.active), (dense_values, everything.active)):
        (plain,) = gradients(cost(active.decode(values, decoder)), decoder)
        (tangent,) = gradients(cost(active.decode(values, decoder, unit=True)), decoder)
        radial = (plain * decoder).sum(1, keepdim=True) * decoder
        assert radial.abs().max().item() > 0.1
        assert torch.allclose(tangent, plain - radial, atol=1e-4)


def test_row_sums_and_dots_are_what_they_say() -> None:
    rows, left = random(0, 6, 4).detach(), random(1, 3, 4).detach()
    index, group, start = torch.tensor([5, 0, 5, 2]), torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2, 2])
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = torch.stack([rows[5] - 2 * rows[0], torch.zeros(4), 0.5 * rows[5] + 3 * rows[2]])
    assert torch.allclose(row_sums(rows, index, start, weight), expected, atol=1e-6)
    assert torch.allclose(row_dots(left, rows, group, index, start), (left[group] * rows[index]).sum(1), atol=1e-6)


GPU_KERNELS = """
import torch
from sae_models.training import kernels, triton_kernels
torch.manual_seed(0)
rows, left, weight = torch.randn(7, 300), torch.randn(5, 300), torch.randn(6)
index, group, start = torch.tensor([6, 0, 6, 2, 1, 1]), torch.tensor([0, 0, 2, 3, 3, 3]), torch.tensor([0, 2, 2, 3, 6])
sums, dots = triton_kernels.row_sums(rows, index, start, weight), triton_kernels.row_dots(left, rows, group, index)
assert torch.allclose(sums, kernels.row_sums(rows, index, start, weight), atol=1e-5)
assert torch.allclose(dots, kernels.row_dots(left, rows, group, index, start), atol=1e-4)
print("equal")
"""


def test_gpu_kernels_are_the_same_sums_and_dots() -> None:
    """Run by Triton's interpreter, which a process has from its start or not at all; no GPU is needed."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", GPU_KERNELS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_pairs_know_their_order_by_latent() -> None:
    pairs = Pairs(torch.tensor([0, 0, 1, 3]), torch.tensor([4, 1, 4, 0]), 4, 6)
    assert pairs.start.tolist() == [0, 2, 3, 3]
    assert pairs.latent[pairs.by_latent.order].tolist() == [0, 1, 4, 4]
    assert pairs.by_latent.start.tolist() == [0, 1, 2, 2, 2, 4]
    assert pairs.totals(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [4, 2, 0, 0, 4, 0]
    assert pairs.where(torch.tensor([True, False, True, False])).latent.tolist() == [4, 4]
