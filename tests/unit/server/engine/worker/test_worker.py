"""The worker's logging, the size of its banks, and the handles in request ids."""

import logging

import pytest
import torch

from rudder.server.engine.worker.worker import build_banks, bytes_of, handle_of, log_like_vllm
from rudder.server.program.layout import Layout


def test_logs_go_to_vllms_handlers_only_where_none_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, vllm = logging.getLogger("rudder"), logging.getLogger("vllm")
    handler = logging.NullHandler()
    monkeypatch.setattr(vllm, "handlers", [handler])
    monkeypatch.setattr(vllm, "level", logging.INFO)
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(ours, name, getattr(ours, name))
    log_like_vllm()
    assert handler not in ours.handlers, "pytest has configured the root logger"
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log_like_vllm()
    assert ours.handlers == [handler]
    assert (ours.level, ours.propagate) == (logging.INFO, False)


def test_shared_buffers_count_once() -> None:
    def size(*sites: str) -> int:
        return bytes_of(build_banks(Layout(sites, rows=4, slots=2), 8, 9, torch.device("cpu")))

    banks = build_banks(Layout(("layers.0.mlp_out",), rows=4, slots=2), 8, 9, torch.device("cpu"))
    shared = banks[0].token.nbytes + sum(buffer.nbytes for buffer in banks[0].sequences.buffers())
    assert size("layers.0.mlp_out", "layers.1.mlp_out") == 2 * size("layers.0.mlp_out") - shared


def test_handles_are_read_from_request_ids() -> None:
    assert [handle_of(request_id) for request_id in ("17-ab", "warmup", "x-3")] == [17, 0, 0]
