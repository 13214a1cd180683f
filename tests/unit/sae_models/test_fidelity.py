"""FVU and L0 do not depend on the chunk size, nor the arithmetic on the precision of stored matrices."""

from dataclasses import replace

import pytest
import torch

from rudder.sae_models import fidelity
from rudder.sae_models.sae import BLOCK, SAE, Normalisation, Router

D = 24


def random_sae(latents: int) -> SAE:
    """Return an SAE with random weights and positive thresholds."""
    g = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(latents, D, generator=g), torch.randn(latents, D, generator=g) / latents
    bias, threshold = torch.randn(latents, generator=g), 4 * torch.rand(latents, generator=g)
    return SAE(encoder, bias, threshold, decoder, torch.randn(D, generator=g))


@pytest.fixture
def x() -> torch.Tensor:
    """Return tokens far from the origin, where a sum of squares loses digits."""
    return torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 50


def test_measures_do_not_depend_on_the_chunk_size(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_sae(40)
    monkeypatch.setattr(fidelity, "ACTIVATIONS_PER_CHUNK", 40 * 7)
    result = fidelity.measure(model, x)
    latents = model.encode(x)
    assert result.tokens == 200
    assert result.l0 == pytest.approx(fidelity.l0(latents))
    assert result.fvu == pytest.approx(fidelity.fvu(x, model.decode(latents)), rel=1e-5)
    target = x.flip(0)
    assert fidelity.measure(model, x, target).fvu == pytest.approx(
        fidelity.fvu(target, model.decode(latents)), rel=1e-5
    )


def test_target_of_a_routed_sae_is_the_routed_site() -> None:
    g = torch.Generator().manual_seed(0)
    model = replace(random_sae(40), router=Router(torch.randn(3, D, generator=g)))
    x = torch.randn(50, 3, D, generator=g)
    output, error = model.forward(x)
    expected = fidelity.fvu(output + error, output)
    assert fidelity.measure(model, x).fvu == pytest.approx(expected, rel=1e-5)


def test_fvu_of_a_constant_target_is_infinite() -> None:
    assert fidelity.measure(random_sae(40), torch.ones(5, D)).fvu > 1e6


def test_dense_latents_carry_their_share_of_the_activations() -> None:
    latents = torch.zeros(100, 5)
    for index, tokens in enumerate((100, 50, 11, 10, 0)):
        latents[:tokens, index] = 1.0
    sums = fidelity.Fidelity()
    for part in latents.split(30):
        sums.add_latents(part)
    assert [sums.dense_latents(frequency) for frequency in (0.0, 0.1, 0.5, 1.0)] == [4, 3, 1, 0]
    assert sums.dense_share(0.1) == pytest.approx(161 / 171)
    assert fidelity.Fidelity(tokens=4, active=torch.zeros(3)).dense_share(0.1) == 0.0


@pytest.mark.parametrize("share", [0.0, 1e-3, 1.0])
def test_decode_skips_rows_that_no_token_uses(share: float) -> None:
    model = random_sae(2 * BLOCK + 5)
    stored = replace(model, decoder=model.decoder.bfloat16())
    exact = replace(stored, decoder=stored.decoder.float())
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, model.latents, generator=g)
    latents *= torch.rand(latents.shape, generator=g) < share
    assert torch.allclose(stored.decode(latents), exact.decode(latents), atol=1e-4)


@pytest.mark.parametrize("normalisation", [Normalisation.NONE, Normalisation.LAYER_NORM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_precision_does_not_change_the_arithmetic(dtype: torch.dtype, normalisation: Normalisation) -> None:
    model = replace(random_sae(2 * BLOCK + 5), normalisation=normalisation)
    stored = replace(model, encoder=model.encoder.to(dtype), decoder=model.decoder.to(dtype))
    exact = replace(stored, encoder=stored.encoder.float(), decoder=stored.decoder.float())
    x = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    latents = stored.encode(x)
    assert torch.allclose(latents, exact.encode(x), atol=1e-4)
    output = stored.forward(x)[0]
    assert torch.allclose(output, exact.forward(x)[0], atol=1e-4)
    (ours,) = torch.autograd.grad(output.sum(), x)
    (theirs,) = torch.autograd.grad(exact.forward(x)[0].sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-3)
