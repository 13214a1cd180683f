"""How a layer represents the residual stream is measured, whatever its class and its modules are called."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rudder.sae_models.activations.layers import Reading, UnknownLayout
from rudder.sae_models.activations.measure import measure
from rudder.sae_models.hookpoints import POINTS
from tests.unit.pretended_gpu import DEVICE, pretended_gpu

WIDTH, TOKENS, DEPTH = 32, 16, 3


class Layer(nn.Module):
    """A decoder layer in one of the ways that vLLM's models are written."""

    def __init__(self, returns: str, scale: float, norm_after: bool, parallel: bool) -> None:
        super().__init__()
        self.returns, self.scale, self.norm_after, self.parallel = returns, scale, norm_after, parallel
        self.input_layernorm = nn.LayerNorm(WIDTH)
        self.self_attn = nn.Linear(WIDTH, WIDTH)
        if norm_after:
            self.norm_a = nn.LayerNorm(WIDTH)
        self.post_attention_layernorm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        if norm_after:
            self.norm_m = nn.LayerNorm(WIDTH)

    def attention(self, x: Tensor) -> Tensor:
        """The attention branch, as it is added to the stream."""
        y = self.self_attn(self.input_layernorm(x))
        added: Tensor = self.scale * (self.norm_a(y) if self.norm_after else y)
        return added

    def feed_forward_branch(self, x: Tensor) -> Tensor:
        """The MLP branch, as it is added to the stream."""
        y = self.mlp(self.post_attention_layernorm(x))
        added: Tensor = self.scale * (self.norm_m(y) if self.norm_after else y)
        return added

    def forward(self, _positions: Tensor, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """Return the stream as `returns` says: one tensor, a pair that sums to it, or the stream and a stale tensor."""
        x = hidden_states + residual if residual is not None and self.returns == "pair" else hidden_states
        middle = x + self.attention(x)
        added = self.feed_forward_branch(x if self.parallel else middle)
        if self.returns == "tensor":
            return middle + added
        return (added, middle) if self.returns == "pair" else (middle + added, middle)


def random_layers(kind: type[nn.Module], *args: Any) -> nn.ModuleList:
    """Layers with weights such that no two of their modules are alike."""
    torch.manual_seed(0)
    layers = nn.ModuleList([kind(*args) for _ in range(DEPTH)]).eval()
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layers


def readings_of(
    layers: nn.ModuleList, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> dict[int, Reading]:
    """Measure all layers in a model that passes on what they return."""
    embedded = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def run() -> None:
        hidden: Any = embedded.clone()
        residual = None
        for layer in layers:
            output = layer(torch.arange(TOKENS, device=device), hidden, residual)
            hidden, residual = (output, None) if isinstance(output, Tensor) else output

    return measure(layers.to(device, dtype), range(DEPTH), TOKENS, WIDTH, run)


@pytest.mark.parametrize("returns", ["tensor", "pair", "stale"])
def test_layers_on_another_device_are_measured_there(returns: str) -> None:
    on_cpu = readings_of(random_layers(Layer, returns, 0.22, True, False))
    with pretended_gpu():
        assert readings_of(random_layers(Layer, returns, 0.22, True, False), device=DEVICE) == on_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("returns", "scale", "norm_after", "parallel"),
    list(product(["tensor", "pair", "stale"], [1.0, 0.22], [False, True], [False, True])),
)
def test_reading_is_that_of_the_layer(
    returns: str, scale: float, norm_after: bool, parallel: bool, dtype: torch.dtype
) -> None:
    readings = readings_of(random_layers(Layer, returns, scale, norm_after, parallel), dtype)
    factor: Any = pytest.approx(scale, rel=1e-4 if dtype == torch.float32 else 5e-3)
    for number, reading in readings.items():
        assert reading.input_is_sum == (returns == "pair" and number > 0)
        assert reading.output_is_sum == (returns == "pair")
        assert reading.attention
        assert reading.mlp
        assert (reading.attention.path, reading.attention.factor) == ("norm_a" if norm_after else "self_attn", factor)
        assert (reading.mlp.path, reading.mlp.factor) == ("norm_m" if norm_after else "mlp", factor)
        assert reading.mlp_input == "mlp"
        assert set(reading.refusals) == ({"resid_mid"} if parallel else set())


class PostNorm(nn.Module):
    """The stream itself is normalised behind each branch, as in OPT 350M."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm, self.mlp = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, _positions: Tensor, hidden_states: Tensor, _residual: Tensor | None) -> Tensor:
        """Return the normalised stream."""
        x: Tensor = self.norm(hidden_states + self.self_attn(hidden_states))
        return 0.5 * x + torch.tanh(x + self.mlp(x.relu()))


class Rescaled(Layer):
    """The stream is multiplied as it leaves the layer."""

    def __init__(self) -> None:
        super().__init__("tensor", 1.0, False, False)

    def forward(self, positions: Tensor, hidden_states: Tensor, _residual: Tensor | None = None) -> Tensor:
        """Return 0.7 of the stream."""
        x: Tensor = 0.7 * super().forward(positions, hidden_states)
        return x


class Unequal(Layer):
    """Its residual counts half."""

    def __init__(self) -> None:
        super().__init__("tensor", 1.0, False, False)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """Return the stream, and a residual that the next layer adds in half."""
        x = hidden_states if residual is None else hidden_states + 0.5 * residual
        return super().forward(positions, x), hidden_states


@pytest.mark.parametrize(
    ("kind", "refused"),
    [(PostNorm, {"attn_out", "resid_mid", "mlp_out"}), (Rescaled, {"attn_out", "resid_mid", "mlp_out"})],
)
def test_branches_that_do_not_add_up_are_refused(kind: type[nn.Module], refused: set[str]) -> None:
    reading = readings_of(random_layers(kind))[1]
    assert set(reading.refusals) == refused
    name = f"site: layers.1.mlp_out: {kind.__name__}: resid_pre + attn_out + mlp_out = resid_post holds for no two"
    with pytest.raises(UnknownLayout, match=rf"^{name.replace('+', '.')}.*: relative error 0\.\d+"):
        reading.check("layers.1.mlp_out", "mlp_out")


def test_residual_that_is_no_summand_is_refused_with_its_error() -> None:
    readings = readings_of(random_layers(Unequal))
    assert set(readings[1].refusals) == set(POINTS)
    with pytest.raises(
        UnknownLayout, match=r"layers\.1\.resid_pre: Unequal: .* through their sum: relative error 0\.\d"
    ):
        readings[1].check("layers.1.resid_pre", "resid_pre")
    assert "the next layer's resid_pre is unknown" in readings[0].refusals["resid_post"]


def run_twice(layers: nn.ModuleList) -> None:
    """Run the first layer twice."""
    x = torch.randn(TOKENS, WIDTH)
    for layer in (layers[0], *layers):
        x = layer(torch.arange(TOKENS), x)


def run_streams(layers: nn.ModuleList) -> None:
    """Run the layers on four residual streams at once."""
    x = torch.randn(4, TOKENS, WIDTH)
    for layer in layers:
        x = layer(torch.arange(TOKENS), x)


def run_between(layers: nn.ModuleList) -> None:
    """Add something to the stream between layers."""
    x = torch.randn(TOKENS, WIDTH)
    for layer in layers:
        x = layer(torch.arange(TOKENS), x) + torch.ones(WIDTH)


@pytest.mark.parametrize(
    ("run", "point", "reason"),
    [
        (run_twice, "resid_pre", "it runs 2 times in a forward pass"),
        (run_streams, "mlp_out", "there may be several residual streams"),
        (run_between, "resid_post", r"resid_post is not the next layer's resid_pre: relative error 0\.\d+"),
    ],
)
def test_model_that_uses_its_layers_otherwise_is_refused(run: Any, point: str, reason: str) -> None:
    layers = random_layers(Layer, "tensor", 1.0, False, False)
    reading = measure(layers, [0], TOKENS, WIDTH, lambda: run(layers))[0]
    with pytest.raises(UnknownLayout, match=reason):
        reading.check(f"layers.0.{point}", point)


def test_measuring_leaves_no_hook_behind() -> None:
    layers = random_layers(Layer, "pair", 1.0, False, False)
    readings_of(layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers.modules())
