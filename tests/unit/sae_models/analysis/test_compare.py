"""Latents of two SAEs are shared where both encoder and decoder agree, and only there."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rudder.sae_models import PRETRAINED
from rudder.sae_models.analysis import compare
from rudder.sae_models.sae import SAE
from rudder.server.cli import main

pytest.importorskip("scipy")


def sae_of(directions: Tensor, decoder: Tensor | None = None) -> SAE:
    """Return an SAE with these encoder rows [F, d], tied unless there is a decoder."""
    zero = torch.zeros(len(directions))
    other = directions if decoder is None else decoder
    return SAE(directions, zero, zero, other, torch.zeros(directions.shape[1]))


@pytest.fixture(scope="module")
def directions() -> Tensor:
    """Return 300 random directions of 64 dimensions."""
    return torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


def test_permuted_and_rescaled_copy_is_shared_completely(directions: Tensor) -> None:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.1, 9, 300)[:, None]
    result = compare.match(sae_of(directions), sae_of((directions * scale)[order], directions[order]))
    assert bool(result.shared.all())
    assert torch.equal(order[result.b], result.a)
    assert len(result.a) == 300


def test_random_dictionaries_share_nothing(directions: Tensor) -> None:
    other = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    assert int(compare.match(sae_of(directions), sae_of(other)).shared.sum()) == 0


def test_half_replaced_dictionary_is_half_shared(directions: Tensor) -> None:
    other = directions.clone()
    other[::2] = torch.randn(150, 64, generator=torch.Generator().manual_seed(3))
    result = compare.match(sae_of(directions), sae_of(other))
    assert int(result.shared.sum()) == 150
    assert torch.equal(result.a[result.shared].sort().values, torch.arange(1, 300, 2))


def test_pairs_that_agree_in_one_matrix_only_are_not_shared(directions: Tensor) -> None:
    result = compare.match(sae_of(directions), sae_of(directions, directions.roll(1, 0)))
    assert int(result.shared.sum()) == 0


def test_assignment_maximises_the_sum_rather_than_greedily() -> None:
    # Greedy matching pairs 0-0 (0.95) and leaves 1-1 (0.6); the pairs 0-1 and 1-0 have a higher sum.
    cosines = torch.tensor([[0.95, 0.9], [0.93, 0.6]])
    rows, columns = (index.flatten() for index in torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"))
    a, b = compare._assign(rows, columns, cosines.flatten(), 2, 2)
    assert dict(zip(a.tolist(), b.tolist(), strict=True)) == {0: 1, 1: 0}


def test_assignment_by_groups_equals_the_assignment_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    g = torch.Generator().manual_seed(4)
    base = torch.randn(20, 16, generator=g).repeat_interleave(8, 0)
    first, second = (base + 0.8 * torch.randn(160, 16, generator=g) for _ in range(2))
    monkeypatch.setattr(compare, "BLOCK", 48)
    result = compare.match(sae_of(first), sae_of(second))
    unit_first, unit_second = (torch.nn.functional.normalize(x, dim=1) for x in (first, second))
    cosines = unit_first @ unit_second.T
    gain = torch.where(cosines > compare.FLOOR, cosines, 0).double().numpy()
    a, b = optimize.linear_sum_assignment(gain, maximize=True)
    assert float(result.encoder.double().sum()) == pytest.approx(float(gain[a, b].sum()), rel=1e-5)
    assert len(result.b.unique()) == len(result.b)
    assert torch.allclose(result.nearest, cosines.amax(1), atol=1e-5)


def test_match_refuses_saes_of_other_widths(directions: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^compare: widths 64 and 32"):
        compare.match(sae_of(directions), sae_of(directions[:, :32]))


def test_bundle_compared_with_itself_is_shared_completely() -> None:
    shipped = PRETRAINED / "textbook-lm-layers.2"
    result = compare.compare(shipped, shipped)
    assert result.shared == result.latents[0] == 4096
    assert result.shared_share == 1.0
    assert sum(result.histogram) == 4096
    assert all(a == b for a, b, _, _ in result.mapping)


def test_command_prints_a_report_and_writes_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = str(PRETRAINED / "textbook-lm-layers.2")
    assert main(["sae", "compare", shipped, shipped, "--mapping", str(tmp_path / "mapping.json")]) == 0
    assert "4,096 latents are shared (100.0%)" in capsys.readouterr().out
    mapping = json.loads((tmp_path / "mapping.json").read_bytes())["mapping"]
    assert [pair[:2] for pair in mapping] == [[number, number] for number in range(4096)]
    assert main(["sae", "compare", shipped, str(tmp_path), "--json"]) == 2
    assert capsys.readouterr().err.startswith(f"rudder: {tmp_path}")
