"""Products run in the dtype that the processor is fast at, unless a run names another."""

import pytest
import torch

from rudder.sae_models import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("has_amx", "expected"), [(False, "float32"), (True, "bfloat16"), (None, "float32")])
def test_a_cpu_without_amx_computes_in_float32(
    has_amx: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {} if has_amx is None else {"amx_bf16": has_amx, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    precision.fast_precision.cache_clear()
    try:
        assert precision.resolve("auto", CPU) == expected
    finally:
        precision.fast_precision.cache_clear()


def test_a_gpu_computes_in_bfloat16_and_a_named_precision_holds() -> None:
    assert precision.resolve("auto", CUDA) == "bfloat16"
    assert precision.resolve("float32", CUDA) == "float32"
    assert precision.resolve("bfloat16", CPU) == "bfloat16"
