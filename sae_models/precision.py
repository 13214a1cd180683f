"""The dtype of large products that a processor is fast at."""

from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
NamedPrecision = Literal["float32", "bfloat16"]
DTYPES: dict[NamedPrecision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(precision: Precision, device: torch.device) -> NamedPrecision:
    """Return a precision, in place of `auto` the one that the device is fast at."""
    return fast_precision(device.type) if precision == "auto" else precision


@cache
def fast_precision(device: str) -> NamedPrecision:
    """Return bfloat16 for a GPU and for a CPU with AMX tiles, else float32.

    Other CPUs emulate bfloat16, up to ten times slower. With AVX-512 BF16 but no AMX a training step takes as long in
    either (docs/benchmarks), and float32 is exact.
    """
    if device != "cpu":
        return "bfloat16"
    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"
