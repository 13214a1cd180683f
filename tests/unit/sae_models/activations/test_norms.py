"""Attention sinks are left out of training, of samples and of the scale; without them nothing changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rudder.sae_models.activations import norms, stream
from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.training import data
from rudder.sae_models.training.trainer import Config, Trainer
from tests.unit.sae_models.activations.test_store import Numbers

SITE = "layers.0.resid_post"
LABEL = "complexity.corpus"


class Sinks(Numbers):
    """Vectors of norm near 4, every seventh of them a sink, numbered in a label beside them."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        object.__setattr__(self, "factor", factor)

    def load(self, chunks: object) -> dict[str, Tensor]:
        """Return the vectors and numbers of some chunks."""
        number = torch.cat([torch.arange(chunk * 35, chunk * 35 + 35) for chunk in chunks])  # type: ignore[attr-defined]
        g = torch.Generator().manual_seed(0)
        x = torch.randn(35 * 30, 16, generator=g)[number]
        x[number % 7 == 0] *= self.factor  # type: ignore[attr-defined]
        return {SITE: x, LABEL: number[:, None].float()}


@pytest.mark.parametrize("factor", [20.0, 1e3, 1e30, float("inf"), float("nan")])
def test_no_batch_holds_an_attention_sink_and_the_stream_resumes(factor: float) -> None:
    order = stream.BatchOrder(50, 300, 0)
    whole = [batch for batch, _ in zip(stream.batches(Sinks(factor), order), range(40), strict=False)]
    for batch in whole:
        assert not bool((batch[LABEL] % 7 == 0).any())
        assert bool((batch[SITE].norm(dim=1) < 10).all())
    resumed = next(stream.batches(Sinks(factor), order, 23))
    assert torch.equal(resumed[SITE], whole[23][SITE])
    assert torch.equal(resumed[LABEL], whole[23][LABEL])


def test_sample_drops_attention_sinks_and_reports_their_share() -> None:
    vectors, share = data.sample(Sinks(1e3), 700)
    assert share == pytest.approx(1 / 7)
    assert len(vectors[SITE]) == len(vectors[LABEL]) == 600
    assert data.sample(Sinks(2.0), 700).outlier_share == 0


def test_scale_follows_the_median_norm() -> None:
    kind = ARCHITECTURES["topk"]
    scales = []
    for factor in (1.0, 1e4):
        x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
        x[::200] *= factor
        trained = Trainer(kind(16, kind.config_type(latents=32, k=4), torch.Generator().manual_seed(0)), Config(1000))
        trained.initialise(x)
        scales.append(trained.scale)
    assert scales[1] == pytest.approx(scales[0], rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 60),
    st.floats(0, 0.45),
    st.sampled_from([1e-20, 1.0, 1e15]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_mask_finds_exactly_the_outliers(count: int, share: float, unit: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(count)
    x = torch.nn.functional.normalize(torch.randn(count, 8, generator=g), dim=1) * unit
    sink = torch.arange(count) < int(share * count)
    x[sink] *= 300
    assert norms.within_limit([x.to(dtype)]).tolist() == (~sink).tolist()


def test_token_is_left_out_at_every_site_if_it_is_an_outlier_at_one() -> None:
    first, second = torch.ones(6, 4), torch.ones(6, 4)
    first[1], second[4] = 1e4, -1e4
    vectors = {"layers.0.resid_post": first, "layers.1.mlp_out": second, LABEL: torch.arange(6.0)[:, None]}
    dropped, share = norms.without_outliers(vectors)
    assert dropped[LABEL].flatten().tolist() == [0, 2, 3, 5]
    assert share == pytest.approx(1 / 3)
    replaced = norms.with_outliers_replaced(vectors)
    assert replaced[LABEL].flatten().tolist() == [0, 2, 2, 3, 5, 5]
    zeros = {"layers.0.mlp_out": torch.zeros(3, 4)}
    assert len(norms.without_outliers(zeros)[0]["layers.0.mlp_out"]) == 3
