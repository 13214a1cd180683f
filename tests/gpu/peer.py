"""A training step of sparsify, the fastest public trainer of TopK SAEs: the same sizes and data as ours.

Its modules are imported without its `__init__`, whose trainer needs packages that a machine with a GPU may not have.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

NAME = "sparsify"
# Its default for 16,384 latents; it falls with the root of their number.
RATE = 5e-3


def is_installed() -> bool:
    """Whether the package can be imported."""
    return all(find_spec(name) for name in (NAME, "schedulefree"))


def module(name: str) -> ModuleType:
    """Import a module of the package."""
    if NAME not in sys.modules:
        spec, package = find_spec(NAME), ModuleType(NAME)
        assert spec
        assert spec.submodule_search_locations
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[NAME] = package
    return import_module(f"{NAME}.{name}")


def step(x: Tensor, latents: int, k: int) -> Callable[[], Tensor]:
    """Return a training step on activations x [batch, d], as its trainer does it by default; the step returns the FVU.

    TopK with its own decoder kernel, in bfloat16 on weights in float32, schedule-free steps by the sign of the
    gradient, and rows of the decoder kept at norm 1. Without the loss on dead latents, of which there are none yet.
    """
    if not x.is_cuda:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    torch.manual_seed(0)
    config = module("config").SparseCoderConfig(num_latents=latents, k=k)
    coder = module("sparse_coder").SparseCoder(x.shape[1], config, x.device, dtype=torch.float32)
    signs = module("sign_sgd").SignSGD(coder.parameters(), RATE / (latents / 2**14) ** 0.5)
    optimizer = import_module("schedulefree").ScheduleFreeWrapper(signs, momentum=0.95)
    optimizer.train()

    def train() -> Tensor:
        coder.set_decoder_norm_to_unit_norm()
        fvu: Tensor = coder(x).fvu
        fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return fvu.detach()

    return train
