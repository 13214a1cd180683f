"""vLLM's two model runners: where each says which request stands in which row of the step, and from which position.

Only this file and the two worker modules know the engine's generation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Place = Callable[[Sequence[str], NDArray[np.int64], NDArray[np.int64]], None]


def install(runner: Any, place: Place) -> None:
    """Have `place(request_ids, starts, lengths)` called once a step, after the runner has laid out its batch."""
    if hasattr(runner, "_prepare_inputs"):
        wrap_v1(runner, place)
    elif hasattr(runner, "prepare_inputs"):
        wrap_v2(runner, place)
    else:
        raise TypeError(f"{type(runner).__name__} is neither vLLM's V1 nor its V2 model runner")


def wrap_v1(runner: Any, place: Place) -> None:
    """V1: the persistent batch holds the row order and the positions computed so far."""
    prepare = runner._prepare_inputs

    def prepare_and_place(scheduler_output: Any, num_scheduled_tokens: NDArray[np.int32]) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens)
        place(*v1_rows(runner.input_batch, num_scheduled_tokens))
        return prepared

    runner._prepare_inputs = prepare_and_place


def wrap_v2(runner: Any, place: Place) -> None:
    """V2: `prepare_inputs` sorts the batch and returns it."""
    prepare = runner.prepare_inputs

    def prepare_and_place(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        place(*v2_rows(batch))
        return batch

    runner.prepare_inputs = prepare_and_place


def v1_rows(batch: Any, lengths: NDArray[np.int32]) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
    """(request ids, first positions, lengths) in row order."""
    number = batch.num_reqs
    return batch.req_ids[:number], batch.num_computed_tokens_cpu[:number].astype(np.int64), lengths.astype(np.int64)


def v2_rows(batch: Any) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
    """(request ids, first positions, lengths) in row order."""
    starts, lengths = batch.num_computed_tokens_np, batch.num_scheduled_tokens
    return batch.req_ids, starts.astype(np.int64), lengths.astype(np.int64)


def padded_tokens(config: Any) -> int:
    """Tokens a bank's buffers must hold: one more than the largest batch, padding included.

    The compiler traces with the largest batch, and a slice as long as its buffer would be taken for a constant.
    """
    sizes = config.compilation_config.cudagraph_capture_sizes or []
    return 1 + int(max([config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs, *sizes]))
