"""How many kernels a site adds to a step, as PyTorch operations: each is a launch on a GPU.

What the Triton kernels launch is counted in tests/conformance/test_kernels.py.
"""

from typing import Any

import pytest
import torch
from torch._inductor import ir
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import get_code

from rudder.server.engine.worker.worker import build_banks
from rudder.server.program.layout import Layout

SITE = "layers.0.resid_post"


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
