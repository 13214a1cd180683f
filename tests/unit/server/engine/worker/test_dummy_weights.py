"""Random weights are scaled so that a layer's branches show beside the residual stream."""

import torch
from torch import nn

from rudder.server.engine.worker.dummy_weights import scale_weights


def test_outputs_of_scaled_weights_are_as_large_as_their_inputs() -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(256, 512, bias=False), nn.LayerNorm(512)
    model = nn.Sequential(linear, norm)
    model.register_parameter("packed", nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False))
    for weight in model.parameters():
        if weight.is_floating_point():
            nn.init.uniform_(weight, -1e-3, 1e-3)
    scale_weights(model)
    x = torch.randn(64, 256)
    assert 0.9 < float(linear(x).detach().square().mean().sqrt()) < 1.1
    assert 0.99 < float(norm.weight.detach().square().mean().sqrt()) < 1.01
    assert dict(model.named_parameters())["packed"].tolist() == [1, 1, 1, 1]
