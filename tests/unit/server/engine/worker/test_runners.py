"""Batch order and positions, read from either runner's batch."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from rudder.server.engine.worker import runners


@dataclass
class PersistentBatch:
    """The fields of V1's batch that are read; the arrays are longer than the batch."""

    num_reqs: int = 2
    req_ids: list[str] = field(default_factory=lambda: ["b", "a", "stale"])
    num_computed_tokens_cpu: NDArray[np.int32] = field(default_factory=lambda: np.array([4, 0, 99, 99], np.int32))


@dataclass
class SortedBatch:
    """The fields of V2's batch that are read."""

    req_ids: list[str] = field(default_factory=lambda: ["a", "b"])
    num_scheduled_tokens: NDArray[np.int32] = field(default_factory=lambda: np.array([1, 5], np.int32))
    num_computed_tokens_np: NDArray[np.int32] = field(default_factory=lambda: np.array([7, 0], np.int32))


def plain(order: runners.BatchOrder) -> tuple[list[str], list[int], list[int]]:
    """Batch order as lists."""
    ids, starts, lengths = order
    assert starts.dtype == lengths.dtype == np.int64
    return list(ids), starts.tolist(), lengths.tolist()


def test_v1_batch_order_is_a_copy() -> None:
    batch = PersistentBatch()
    order = runners.v1_batch_order(batch, np.array([3, 2], np.int32))
    assert plain(order) == (["b", "a"], [4, 0], [3, 2])
    # The runner advances its own counters while the step is still being read.
    batch.num_computed_tokens_cpu += 1
    assert plain(order)[1] == [4, 0]


def test_v2_batch_order() -> None:
    assert plain(runners.v2_batch_order(SortedBatch())) == (["a", "b"], [7, 0], [1, 5])


class V1Runner:
    """Orders its batch in `_prepare_inputs`."""

    def __init__(self) -> None:
        self.input_batch = PersistentBatch(num_reqs=0)

    def _prepare_inputs(self, _scheduled: object, _lengths: NDArray[np.int32]) -> str:
        self.input_batch = PersistentBatch()
        return "prepared"


class V2Runner:
    """Returns its batch from `prepare_inputs`."""

    def prepare_inputs(self, _scheduled: object, *, padded: int) -> SortedBatch:
        return SortedBatch(req_ids=["a", "b"][:padded])


def test_callback_runs_after_the_batch_is_ordered() -> None:
    orders: list[runners.BatchOrder] = []
    v1, v2 = V1Runner(), V2Runner()
    for runner in (v1, v2):
        runners.install(runner, lambda *order: orders.append(order))
    assert v1._prepare_inputs(None, np.array([3, 2], np.int32)) == "prepared"
    assert isinstance(v2.prepare_inputs(None, padded=8), SortedBatch)
    assert [plain(order) for order in orders] == [(["b", "a"], [4, 0], [3, 2]), (["a", "b"], [7, 0], [1, 5])]


def test_unknown_runner_is_refused() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace is neither"):
        runners.install(SimpleNamespace(), lambda *_: None)


@pytest.mark.parametrize(("sizes", "largest"), [(None, 64), ([], 64), ([1, 2, 512], 512)])
def test_buffers_hold_more_than_the_largest_padded_batch(sizes: list[int] | None, largest: int) -> None:
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8),
    )
    assert runners.padded_tokens(config) == largest + 1
