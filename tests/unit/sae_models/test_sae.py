"""The canonical SAE: rows agree with the full encode, thresholds are strict; the definitions of FVU and L0."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models import fidelity
from rudder.sae_models import sae as canonical
from rudder.sae_models.sae import SAE


def random_sae(latents: int, width: int, seed: int) -> SAE:
    """Return an SAE with random weights, unit decoder rows and positive thresholds."""
    g = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(latents, width, generator=g), dim=1)
    bias, threshold = torch.randn(latents, generator=g), torch.rand(latents, generator=g)
    return SAE(torch.randn(latents, width, generator=g), bias, threshold, decoder, torch.randn(width, generator=g))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 17), st.integers(0, 10_000))
def test_rows_give_the_columns_of_the_full_encode(data: st.DataObject, latents: int, width: int, seed: int) -> None:
    sae = random_sae(latents, width, seed)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, latents - 1), min_size=1, max_size=8)))
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(seed + 1))
    z = x @ sae.encoder.T + sae.bias
    sure = ((z - sae.threshold).abs() > 1e-4)[..., chosen]
    difference = (canonical.activations(x, sae.exact_rows(chosen)) - sae.encode(x)[..., chosen]).abs()
    assert float((difference * sure).max()) < 1e-5
    assert torch.equal(sae.exact_rows(chosen).decoder, sae.decoder[chosen])


def test_threshold_is_strict_and_is_not_subtracted() -> None:
    sae = SAE(torch.eye(3), torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), torch.eye(3), torch.zeros(3))
    x = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 1.5, 2.5]])
    assert sae.encode(x).tolist() == [[0.0, 0.0, 0.0], [0.0, 1.5, 2.5]]


def test_forward_splits_x_into_reconstruction_and_error() -> None:
    sae = random_sae(20, 8, 0)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    reconstruction, error = sae.forward(x)
    assert torch.allclose(reconstruction + error, x, atol=1e-5)
    assert torch.allclose(reconstruction, sae.decode(sae.encode(x)))
    assert float(error.norm()) > 0.1


def test_half_precision_input_is_computed_in_float32() -> None:
    sae = random_sae(20, 8, 0)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert sae.encode(x).dtype == torch.float32
    assert torch.equal(sae.encode(x), sae.encode(x.float()))


@pytest.mark.parametrize(
    ("reconstruct", "expected"),
    [
        (lambda x: x, 0.0),
        (lambda x: x.mean(0).expand_as(x), 1.0),
        (lambda x: x.mean(0) + 0.5 * (x - x.mean(0)), 0.25),
        (lambda x: 2 * x.mean(0) - x, 4.0),
    ],
)
def test_fvu_is_error_over_variance(reconstruct: Callable[[torch.Tensor], torch.Tensor], expected: float) -> None:
    x = 100 + torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert fidelity.fvu(x, reconstruct(x)) == pytest.approx(expected, abs=1e-4)


def test_l0_counts_active_latents_per_token() -> None:
    assert fidelity.l0(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])) == 1.5
