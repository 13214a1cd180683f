"""The witness records the residual stream as a model's own parts receive it, split between the requests of a step."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rudder.server.engine.worker.witness import Witness

WIDTH = 4


class Norm(nn.Module):
    """A norm that adds the residual to what it is called with, as vLLM's fused norms do."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stream = hidden if residual is None else hidden + residual
        return stream / 2, stream


class Layer(nn.Module):
    """A layer that returns (hidden, residual), or the whole stream beside a residual that nobody reads any more."""

    def __init__(self, stale: bool) -> None:
        super().__init__()
        self.norm, self.branch, self.stale = Norm(), nn.Linear(WIDTH, WIDTH), stale

    def forward(self, _positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, stream = self.norm(hidden) if self.stale else self.norm(hidden, residual)
        added = self.branch(normed)
        return (stream + added, stream) if self.stale else (added, stream)


class Model(nn.Module):
    """Two layers and a final norm; `do_not_compile` as vLLM's compiled models have it."""

    def __init__(self, stale: bool) -> None:
        super().__init__()
        self.do_not_compile, self.stale = False, stale
        self.layers, self.final = nn.ModuleList([Layer(stale), Layer(stale)]), Norm()

    def forward(self, x: Tensor) -> Tensor:
        hidden, residual = x, None
        for layer in self.layers:
            hidden, residual = layer(torch.arange(len(x)), hidden, residual)
        out: Tensor = (self.final(hidden) if self.stale else self.final(hidden, residual))[0]
        return out


@pytest.mark.parametrize("stale", [False, True])
def test_witness_records_the_stream_of_each_request(stale: bool) -> None:
    model, x = Model(stale), torch.randn(5, WIDTH)
    streams = [x]
    for layer in model.layers:
        streams.append(streams[-1] + layer.branch(streams[-1] / 2))  # type: ignore[operator]
    witness = Witness(model.layers, WIDTH, lambda: [(7, 0, 2), (8, 2, 2)])
    witness.attach(model, (0, 1, 2))
    assert model.do_not_compile
    model(x)
    recorded = witness.detach()
    assert not model.do_not_compile
    assert recorded.keys() == {(handle, boundary) for handle in (7, 8) for boundary in (0, 1, 2)}
    for (handle, boundary), data in recorded.items():
        tokens = slice(0, 2) if handle == 7 else slice(2, 4)
        expected = streams[boundary][tokens].detach().numpy()
        np.testing.assert_allclose(np.frombuffer(data, "<f4").reshape(-1, WIDTH), expected, rtol=1e-6)
    before = dict(witness.streams)
    model(x)
    assert witness.streams.keys() == before.keys()
    assert all(len(parts) == 1 for parts in witness.streams.values())
