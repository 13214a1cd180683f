"""Layers that have no residual stream between their branches are refused, not read wrongly."""

import pytest
import torch
from torch import Tensor, nn

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
        """What only matters here: the attention branch and what it is added to."""
        added: Tensor = self.self_attn(hidden_states)
        return hidden_states + added


@pytest.mark.parametrize(("norms", "parallel"), [(2, True), (1, False)])
def test_branches_at_once_have_no_middle(norms: int, parallel: bool) -> None:
    (bank,) = build_banks(Layout((SITE,), rows=2, slots=1), 4, 8, torch.device("cpu"))
    with pytest.raises(UnknownLayout, match=r"site: layers\.0\.resid_mid: the branches of Layer do not follow"):
        attach(bank, nn.ModuleList([Layer(norms, parallel)]))


@torch.no_grad()
def test_the_middle_is_read_behind_the_attention() -> None:
    (bank,) = build_banks(Layout((SITE,), rows=2, slots=1), 4, 8, torch.device("cpu"))
    layer, x = Layer(2, parallel=False), torch.randn(3, 4)
    wanted = layer(x)
    attach(bank, nn.ModuleList([layer]))
    bank.token[4, :3] = torch.arange(1, 4)
    assert torch.allclose(layer(x), wanted)
    assert torch.allclose(bank.before[1:4], wanted)
