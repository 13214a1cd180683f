"""Which floating-point type this processor multiplies matrices in fastest. Without torch."""

from pathlib import Path
from typing import Literal

CPUINFO = Path("/proc/cpuinfo")
# Matrix units for bfloat16, by their flags in /proc/cpuinfo: x86-64, and Arm. AVX-512 BF16 alone is none: on an Intel
# processor without AMX, PyTorch's products of 256 rows and more took 1.8 times as long in bfloat16 as in float32.
MATRIX_UNITS = {"amx_bf16": "AMX", "bf16": "BF16 of Arm"}


def fast_dtype(cpuinfo: Path = CPUINFO) -> tuple[Literal["bfloat16", "float32"], str]:
    """Return the faster of bfloat16 and float32 on this processor, and why; bfloat16 where nothing tells."""
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    if not words:
        return "bfloat16", "nothing says what this processor has"
    if units := [name for flag, name in MATRIX_UNITS.items() if flag in words]:
        return "bfloat16", f"this processor has a matrix unit for bfloat16 ({units[0]})"
    return "float32", "this processor has no matrix unit for bfloat16 (AMX), and is slower in it"
