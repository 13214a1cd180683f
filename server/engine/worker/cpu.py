"""`worker_cls` on a CPU."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.cpu_worker import CPUWorker

from rudder.server.engine.worker.worker import SteeringWorker


class Worker(SteeringWorker, CPUWorker):
    """vLLM's CPU worker with banks."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then mend vLLM's runner."""
        super().load_model(*args, **kwargs)
        rewind_generators(self.model_runner)


class RewindingGenerator(torch.Generator):
    """A generator with the methods by which vLLM takes back a draw, which PyTorch has for CUDA alone.

    vLLM samples a token behind each part of a prompt, and discards those of all parts but the last. Without these
    methods a client's seed and a prompt in parts end the engine.
    """

    before: Tensor

    def get_offset(self) -> int:
        """Return a number; only the difference to it is used."""
        return 0

    def set_offset(self, _offset: int) -> torch.Generator:
        """Take back what was drawn in this step."""
        return self.set_state(self.before)


def rewind_generators(runner: Any) -> None:
    """Let vLLM take back draws from the generators of requests with a seed."""
    prepare = runner._prepare_inputs

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        batch = runner.input_batch
        for index in np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist():
            if generator := batch.generators.get(index):
                rewinding = rewinding_of(generator)
                batch.generators[index] = runner.requests[batch.req_ids[index]].generator = rewinding
        return prepared

    runner._prepare_inputs = prepare_inputs


def rewinding_of(generator: torch.Generator) -> RewindingGenerator:
    """Return a generator that continues another one, or that one, and can return to its present state."""
    rewinding = generator if isinstance(generator, RewindingGenerator) else RewindingGenerator()
    rewinding.before = generator.get_state()
    rewinding.set_state(rewinding.before)
    return rewinding
