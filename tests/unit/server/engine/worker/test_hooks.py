"""The hook point between a layer's branches: refused where a layer has none."""

import pytest
import torch
from torch import Tensor, nn

from rudder.sae_models.operations import TOKEN
from rudder.server.engine.worker.hooks import UnknownLayout, attach
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program.layout import Layout

SITE = "layers.0.resid_mid"


class Layer(nn.Module):
    """A decoder layer as vLLM writes them."""

    def __init__(self, norms: int, parallel: bool) -> None:
        super().__init__()
        self.use_parallel_residual = parallel
        self.norms = norms
        self.self_attn = nn.Linear(4, 4)
        self.input_layernorm = nn.LayerNorm(4)
        if norms > 1:
            self.post_attention_layernorm = nn.LayerNorm(4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The attention branch, added to the layer's input."""
        added: Tensor = self.self_attn(hidden_states)
        return hidden_states + added


@pytest.mark.parametrize(("norms", "parallel"), [(2, True), (1, False)])
def test_parallel_branches_are_refused(norms: int, parallel: bool) -> None:
    (bank,) = build_banks(Layout((SITE,), rows=2, slots=1), 4, 8, torch.device("cpu"))
    with pytest.raises(UnknownLayout, match=r"site: layers\.0\.resid_mid: the branches of Layer do not follow"):
        attach(bank, nn.ModuleList([Layer(norms, parallel)]))


@torch.no_grad()
def test_resid_mid_reads_the_layer_input_plus_the_attention_output() -> None:
    (bank,) = build_banks(Layout((SITE,), rows=2, slots=1), 4, 8, torch.device("cpu"))
    layer, x = Layer(2, parallel=False), torch.randn(3, 4)
    expected = layer(x)
    attach(bank, nn.ModuleList([layer]))
    bank.token[TOKEN.index("capture"), :3] = torch.arange(1, 4)
    assert torch.allclose(layer(x), expected)
    assert torch.allclose(bank.before[1:4], expected)
