"""Random weights (`load_format: dummy`) as large as trained ones.

vLLM draws them within 1e-3 of 0. What a layer's branches add to the residual stream is then less than its rounding, and
the self-test and the measurement of layers (`dummy.py`) could not tell a right hook from a wrong one.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

LOAD_FORMAT = "dummy"


class ScaledDummyLoader(DummyModelLoader):
    """vLLM's loader of random weights, which scales them before kernels pack or quantise them."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Draw the weights of all modules."""
        super().load_weights(model, model_config)
        scale_weights(model)


@torch.no_grad()
def scale_weights(model: nn.Module) -> None:
    """Scale weights so that outputs are as large as inputs: to a root mean square of fan_in^-0.5, vectors to 1."""
    for weight in model.parameters():
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
            fan_in = weight.shape[-1] if weight.ndim > 1 else 1
            weight.mul_(fan_in**-0.5 / weight.float().square().mean().sqrt().clamp_min(1e-30))


def register() -> None:
    """Let vLLM load random weights with `ScaledDummyLoader`."""
    register_model_loader(LOAD_FORMAT)(ScaledDummyLoader)
