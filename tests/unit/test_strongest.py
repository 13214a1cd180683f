"""The screened search finds what the full encode finds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models.sae import SAE
from sae_models.strongest import screen, strongest


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
    latents, values = strongest(screen(sae), x, k)
    encoded = sae.encode(x).clamp_min(0.0)
    torch.testing.assert_close(torch.from_numpy(values), encoded.topk(k, dim=1).values, rtol=1e-4, atol=1e-4 * scale)
    found = encoded.gather(1, torch.from_numpy(latents).long())
    torch.testing.assert_close(
        torch.where(torch.from_numpy(values) > 0, found, 0.0), torch.from_numpy(values), rtol=1e-4, atol=1e-4 * scale
    )


def test_a_latent_just_above_its_threshold_is_not_missed() -> None:
    x = torch.full((1, 4096), 1.0 + 2**-9)
    encoder = torch.full((1, 4096), 1.0 + 2**-9)
    z = float((x @ encoder.T)[0, 0])
    sae = SAE(encoder, torch.zeros(1), torch.tensor([z * (1 - 1e-6)]), encoder.clone(), torch.zeros(4096))
    latents, values = strongest(screen(sae), x, 1)
    assert values[0, 0] > 0
    assert latents[0, 0] == 0
