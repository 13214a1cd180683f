"""The floating-point type that this processor is fast in."""

from pathlib import Path

import pytest

from rudder.sae_models.precision import fast_dtype


@pytest.mark.parametrize(
    ("flags", "dtype", "reason"),
    [
        ("avx2 fma", "float32", "no matrix unit"),
        ("avx2 avx512f avx512_vnni", "float32", "no matrix unit"),
        ("avx512f avx512_bf16", "float32", "no matrix unit"),
        ("avx512f avx512_bf16 amx_bf16 amx_tile", "bfloat16", "AMX"),
        ("asimd bf16", "bfloat16", "BF16 of Arm"),
        ("", "bfloat16", "nothing says"),
    ],
)
def test_bfloat16_is_fast_where_there_is_a_matrix_unit_for_it(
    flags: str, dtype: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n" if flags else "")
    chosen, said = fast_dtype(tmp_path / "cpuinfo")
    assert chosen == dtype
    assert reason in said


def test_system_without_cpuinfo_keeps_bfloat16(tmp_path: Path) -> None:
    assert fast_dtype(tmp_path / "nowhere")[0] == "bfloat16"
