"""Banks read the residual stream and what is added to it, as the layer was measured."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rudder.sae_models.activations.layers import Branch, Reading, UnknownLayout
from rudder.sae_models.operations import TOKEN
from rudder.server.engine.worker.bank import SiteBank
from rudder.server.engine.worker.hooks import attach, layer_numbers
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program.layout import Layout

SITE = "layers.0.resid_mid"
ATTENTION, MLP = Branch("self_attn"), Branch("mlp")
PLAIN = Reading("Layer", attention=ATTENTION, mlp=MLP, mlp_input="mlp")


class Layer(nn.Module):
    """A decoder layer as vLLM writes them; `pair`: it takes and returns (hidden, residual)."""

    def __init__(self, scale: float = 1.0, pair: bool = False) -> None:
        super().__init__()
        self.scale, self.pair = scale, pair
        self.self_attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """Add attention, then MLP, each multiplied by `scale`, to the layer's input."""
        x = hidden_states if residual is None else hidden_states + residual
        middle = x + self.scale * self.self_attn(x)
        added = self.scale * self.mlp(middle)
        return (added, middle) if self.pair else middle + added


def bank_at(site: str) -> SiteBank:
    """Build a bank of width 4 that captures the first three tokens."""
    (bank,) = build_banks(Layout((site,), rows=2, slots=1), 4, 8, torch.device("cpu"))
    bank.token[TOKEN.index("capture"), :3] = torch.arange(1, 4)
    return bank


def values_of(layer: Layer, x: Tensor) -> dict[str, Tensor]:
    """What each hook point of a layer is, by its definition."""
    attention = layer.scale * layer.self_attn(x)
    middle = x + attention
    added = layer.scale * layer.mlp(middle)
    return {
        "resid_pre": x, "attn_out": attention, "resid_mid": middle, "mlp_in": middle,
        "mlp_out": added, "resid_post": middle + added,
    }  # fmt: skip


def test_parallel_branches_are_refused() -> None:
    reading = Reading("Layer", refusals={"resid_mid": "its branches do not follow one another"})
    with pytest.raises(UnknownLayout, match=r"site: layers\.0\.resid_mid: Layer: its branches do not follow"):
        attach(bank_at(SITE), nn.ModuleList([Layer()]), reading)


def test_site_behind_the_last_layer_is_refused() -> None:
    layers = nn.ModuleList([Layer(), Layer()])
    assert layer_numbers(["layers.1.mlp_in", "layers.1.mlp_out", "layers.0.resid_pre"], layers) == [0, 1]
    with pytest.raises(UnknownLayout, match=r"layers\.7\.resid_post of a model with 2 layers"):
        layer_numbers(["layers.1.mlp_in", "layers.7.resid_post"], layers)


@torch.no_grad()
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("point", values_of(Layer(), torch.zeros(3, 4)))
def test_each_point_is_read_and_edited_as_its_name_says(point: str, scale: float, pair: bool) -> None:
    layer, (hidden, residual) = Layer(scale, pair), torch.randn(2, 3, 4)
    x = hidden + residual if pair else hidden
    expected, move = values_of(layer, x), torch.randn(4)
    bank = bank_at(f"layers.0.{point}")
    reading = Reading("Layer", pair, pair, Branch("self_attn", scale), Branch("mlp", scale), "mlp")
    attach(bank, nn.ModuleList([layer]), reading)

    def run() -> Tensor:
        return torch.stack(layer(hidden, residual)).sum(0) if pair else layer(hidden)

    post = run()
    torch.testing.assert_close(bank.before[1:4], expected[point])
    torch.testing.assert_close(post, expected["resid_post"])

    displaced = bank.register_forward_hook(lambda _bank, _args, output: output + move)
    edited = run()
    displaced.remove()
    torch.testing.assert_close(edited, edited_post(layer, x, point, move))


def edited_post(layer: Layer, x: Tensor, point: str, move: Tensor) -> Tensor:
    """The layer's output where one hook point is displaced by `move`."""
    by = {name: move if name == point else torch.zeros(4) for name in values_of(layer, x)}
    pre = x + by["resid_pre"]
    middle = pre + layer.scale * layer.self_attn(pre) + by["attn_out"] + by["resid_mid"]
    post: Tensor = middle + layer.scale * layer.mlp(middle + by["mlp_in"]) + by["mlp_out"] + by["resid_post"]
    return post


@torch.no_grad()
def test_stale_second_output_is_not_read() -> None:
    """StableLM and Cohere return the whole stream, and with it a tensor that is already in it."""
    layer, x = Layer(pair=False), torch.randn(3, 4)
    stale = nn.Sequential(layer)
    stale.forward = lambda hidden_states: (layer(hidden_states), hidden_states)  # type: ignore[method-assign]
    bank = bank_at("layers.0.resid_post")
    attach(bank, nn.ModuleList([stale]), Reading("Layer", attention=ATTENTION, mlp=MLP))
    stream, _ = stale(x)
    torch.testing.assert_close(bank.before[1:4], layer(x))
    torch.testing.assert_close(stream, layer(x))


@torch.no_grad()
def test_resid_mid_reads_the_layer_input_plus_the_attention_output() -> None:
    bank, layer, x = bank_at(SITE), Layer(), torch.randn(3, 4)
    expected = layer(x)
    attach(bank, nn.ModuleList([layer]), PLAIN)
    assert torch.allclose(layer(x), expected)
    assert torch.allclose(bank.before[1:4], x + layer.self_attn(x))
