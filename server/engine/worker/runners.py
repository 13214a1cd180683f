"""vLLM's two model runners: how each says in which order the requests of a step are batched, and from which position.

Only this file, `worker.py` and the two worker classes depend on vLLM's engine version.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# (request ids, first positions, numbers of tokens), each in batch order.
BatchOrder = tuple[Sequence[str], Ints, Ints]
OnBatch = Callable[[Sequence[str], Ints, Ints], None]


def install(runner: Any, on_batch: OnBatch) -> None:
    """Call `on_batch(request_ids, starts, lengths)` once a step, after the runner has ordered its batch."""
    if hasattr(runner, "_prepare_inputs"):
        wrap_v1(runner, on_batch)
    elif hasattr(runner, "prepare_inputs"):
        wrap_v2(runner, on_batch)
    else:
        raise TypeError(f"{type(runner).__name__} is neither vLLM's V1 nor its V2 model runner")


def wrap_v1(runner: Any, on_batch: OnBatch) -> None:
    """V1: the persistent batch holds the order of requests and the positions computed so far."""
    prepare = runner._prepare_inputs

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: NDArray[np.int32]) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens)
        on_batch(*v1_batch_order(runner.input_batch, num_scheduled_tokens))
        return prepared

    runner._prepare_inputs = prepare_inputs


def wrap_v2(runner: Any, on_batch: OnBatch) -> None:
    """V2: `prepare_inputs` sorts the batch and returns it."""
    prepare = runner.prepare_inputs

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        on_batch(*v2_batch_order(batch))
        return batch

    runner.prepare_inputs = prepare_inputs


def v1_batch_order(batch: Any, lengths: NDArray[np.int32]) -> BatchOrder:
    """Read V1's persistent batch. Copies: the runner advances its own counters while the step is still being read."""
    number = batch.num_reqs
    return batch.req_ids[:number], batch.num_computed_tokens_cpu[:number].astype(np.int64), lengths.astype(np.int64)


def v2_batch_order(batch: Any) -> BatchOrder:
    """Read V2's sorted batch."""
    starts, lengths = batch.num_computed_tokens_np, batch.num_scheduled_tokens
    return batch.req_ids, starts.astype(np.int64), lengths.astype(np.int64)


def announced(output: Any, announce: Callable[[], None]) -> Any:
    """Call `announce` before vLLM has the output of a step: now, or when it collects one that is still computed.

    vLLM collects the outputs of its steps in order, each once. None: a later call of the runner returns the output.
    """
    collect = getattr(output, "get_output", None)
    if collect:

        def get_output() -> Any:
            announce()
            return collect()

        output.get_output = get_output
    elif output is not None:
        announce()
    return output


def without_cuda_graphs(runner: Any) -> Callable[[], None]:
    """Run the model without CUDA graphs, in whose replay no hook runs; return a function that ends this.

    Of the runner's flags this is the one by which it finds no graph for a batch.
    """
    manager = getattr(runner, "cudagraph_manager", None)
    owner, flag = (manager, "_graphs_captured") if manager else (runner.cudagraph_dispatcher, "keys_initialized")
    captured = getattr(owner, flag)
    setattr(owner, flag, False)
    return lambda: setattr(owner, flag, captured)


def padded_tokens(config: Any) -> int:
    """Tokens that a bank's buffers must hold: one more than the largest batch, padding included.

    The compiler traces with the largest batch, and would take a slice as long as its buffer for a constant.
    """
    sizes = config.compilation_config.cudagraph_capture_sizes or []
    return 1 + int(max([config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs, *sizes]))
