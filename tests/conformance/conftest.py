"""Inputs for the libraries and for this project: random ones, and residuals of the shipped model at layer 2."""

import os

# Read by Triton when it is imported, as some of the libraries do: the bank's kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conformance.agreement import TOKENS, D

SHIPPED = Path(__file__).parents[2] / "sae_models" / "pretrained" / "textbook-lm-layers.2"
# The libraries are installed in a separate environment, `make conformance`.
collect_ignore_glob = [] if find_spec("sae_lens") else ["test_*.py"]

torch.set_num_threads(1)
# sparsify would decode with its Triton kernels, which need a GPU.
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


@pytest.fixture(scope="session", params=["random", "real"])
def x(request: pytest.FixtureRequest) -> Tensor:
    """Return inputs [TOKENS, D]."""
    if request.param == "real":
        return load_file(SHIPPED / "conformance.safetensors")["inputs"][:TOKENS]
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(7)) * 4
