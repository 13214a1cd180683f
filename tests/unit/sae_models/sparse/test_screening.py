"""Screening returns the top k of the full encode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse.screening import prepare_screening, top_k_latents


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000), st.sampled_from([0.01, 1.0, 300.0]), st.sampled_from([0.0, 1.0, 2.5]), st.integers(1, 60)
)
def test_equals_the_full_encode(seed: int, scale: float, threshold: float, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 24, generator=generator) * scale
    encoder = torch.randn(200, 24, generator=generator) * torch.rand(200, 1, generator=generator) * 3
    bias = torch.randn(200, generator=generator) * scale
    sae = SAE(encoder, bias, torch.full((200,), threshold * scale), encoder.clone(), torch.zeros(24))
    latents, values = top_k_latents(prepare_screening(sae), x, k)
    encoded = sae.encode(x).clamp_min(0.0)
    torch.testing.assert_close(torch.from_numpy(values), encoded.topk(k, dim=1).values, rtol=1e-4, atol=1e-4 * scale)
    at_latents = encoded.gather(1, torch.from_numpy(latents).long())
    torch.testing.assert_close(
        torch.where(torch.from_numpy(values) > 0, at_latents, 0.0),
        torch.from_numpy(values),
        rtol=1e-4,
        atol=1e-4 * scale,
    )


def test_latent_just_above_its_threshold_is_not_missed() -> None:
    x = torch.full((1, 4096), 1.0 + 2**-9)
    encoder = torch.full((1, 4096), 1.0 + 2**-9)
    z = float((x @ encoder.T)[0, 0])
    sae = SAE(encoder, torch.zeros(1), torch.tensor([z * (1 - 1e-6)]), encoder.clone(), torch.zeros(4096))
    latents, values = top_k_latents(prepare_screening(sae), x, 1)
    assert values[0, 0] > 0
    assert latents[0, 0] == 0


def aligned(values: Tensor) -> Tensor:
    """Return a unit vector, exact in bfloat16, along the rounding error of values [n], n a power of 4."""
    rounding = values - values.bfloat16().float()
    unit: Tensor = rounding.sign() / len(values) ** 0.5
    return unit


def worst_cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and directions whose bfloat16 product is too small by nearly the error bound."""
    values = torch.nn.functional.normalize(torch.randn(4096, generator=torch.Generator().manual_seed(0)), dim=0)
    beside = torch.ones(4096)
    beside[0] = 16.875
    return {
        "the input is rounded": (values, aligned(values)),
        "the direction is rounded": (aligned(values), values),
        "the product is rounded": (beside, torch.full((4096,), 1 / 64)),
    }


@pytest.mark.parametrize("case", worst_cases())
@pytest.mark.parametrize("count", [1, 2])
def test_latent_that_bfloat16_rounds_below_its_threshold_is_not_missed(case: str, count: int) -> None:
    x, direction = worst_cases()[case]
    z = float(x.double() @ direction.double())
    bias = torch.tensor([max(0.0, 1 - z), -10 * x.norm()])[:count]
    sae = SAE(direction.repeat(count, 1), bias, bias + z - 1e-5, direction.repeat(count, 1), torch.zeros(4096))
    latents, values = top_k_latents(prepare_screening(sae), x[None], 1)
    assert values[0, 0] > 0
    assert latents[0, 0] == 0


@pytest.mark.parametrize("case", worst_cases())
def test_latent_that_bfloat16_rounds_below_another_is_still_first(case: str) -> None:
    x, direction = worst_cases()[case]
    encoder = torch.stack([direction, -direction])
    z = float(x.double() @ direction.double())
    # The other latent is slightly less active, and bfloat16 moves it up.
    bias = torch.tensor([10.0, 10 + 2 * z - 1e-4])
    sae = SAE(encoder, bias, torch.zeros(2), encoder, torch.zeros(4096))
    latents, _ = top_k_latents(prepare_screening(sae), x[None], 1)
    assert latents[0, 0] == 0
