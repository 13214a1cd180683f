"""How many kernels a site adds to a step, as PyTorch operations: each is a launch on a GPU.

What the Triton kernels launch is counted in tests/conformance/test_kernels.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import get_code, run_and_get_code

from rudder.server.engine.worker.bank import write_stage
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program.layout import Layout

SITE = "layers.0.resid_post"
MAX_TOKENS = 2049


@pytest.mark.long
@pytest.mark.parametrize(("sequence_sites", "most"), [((), 5), ((SITE,), 9)])
def test_kernels_of_a_site(sequence_sites: tuple[str, ...], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted behind Inductor's fusion, without compiling what it generates."""
    kernels: list[int] = []
    fuse = Scheduler.fuse_nodes

    def counted(scheduler: Any, nodes: list[Any]) -> Any:
        fused = fuse(scheduler, nodes)
        # An operator with one result or several is one kernel.
        kernels.append(sum(not isinstance(node.node, ir.MultiOutput) for node in fused))
        return fused

    monkeypatch.setattr(Scheduler, "fuse_nodes", counted)
    (bank,) = build_banks(Layout((SITE,), sequence_sites=sequence_sites), 64, 16, torch.device("cpu"))
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        get_code(torch.compile(bank, fullgraph=True, dynamic=False), torch.zeros(8, 64))
    assert 4 <= kernels[0] <= most


class TwoStages(torch.nn.Module):
    """Two stages that write masks of their tokens to one buffer."""

    edited: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edited", torch.zeros(2, MAX_TOKENS, 32, dtype=torch.bool))

    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        places = torch.arange(f.shape[1])
        for stage in range(2):
            within = (x.abs().amax(1) <= 2.0)[:, None]
            write_stage(self.edited, stage, ((f > stage) | (places == stage)) & within)
            x = x + f @ f.T @ x
        return x


def test_stage_writes_only_its_tokens_in_a_compiled_graph() -> None:
    """Assigning to slices, Inductor loops over all MAX_TOKENS, in C++ that AVX-512 compilers refuse."""
    torch.compiler.reset()
    f, x = torch.randn(5, 32), torch.randn(5, 8)
    expected, compiled = TwoStages(), TwoStages()
    with torch._inductor.config.patch(force_disable_caches=True), torch.inference_mode():
        _, code = run_and_get_code(torch.compile(compiled, fullgraph=True), f, x)
        expected(f, x)
    assert torch.equal(compiled.edited, expected.edited)
    assert expected.edited[:, :5].any()
    assert f"static_cast<int64_t>({MAX_TOKENS}L)" not in "".join(code)
