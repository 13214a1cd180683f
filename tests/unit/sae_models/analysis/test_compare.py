"""Latents are matched across SAEs where encoder and decoder agree, and only there."""

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
    """An SAE with these encoder rows [F, d], tied unless a decoder is given."""
    zero = torch.zeros(len(directions))
    other = directions if decoder is None else decoder
    return SAE(directions, zero, zero, other, torch.zeros(directions.shape[1]))


@pytest.fixture(scope="module")
def directions() -> Tensor:
    """300 random directions of 64 dimensions."""
    return torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


def test_a_permuted_and_rescaled_copy_is_shared_whole(directions: Tensor) -> None:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.1, 9, 300)[:, None]
    found = compare.match(sae_of(directions), sae_of((directions * scale)[order], directions[order]))
    assert bool(found.shared.all())
    assert torch.equal(order[found.b], found.a)
    assert len(found.a) == 300


def test_random_dictionaries_share_nothing(directions: Tensor) -> None:
    other = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    assert int(compare.match(sae_of(directions), sae_of(other)).shared.sum()) == 0


def test_half_replaced_is_half_shared(directions: Tensor) -> None:
    other = directions.clone()
    other[::2] = torch.randn(150, 64, generator=torch.Generator().manual_seed(3))
    found = compare.match(sae_of(directions), sae_of(other))
    assert int(found.shared.sum()) == 150
    assert torch.equal(found.a[found.shared].sort().values, torch.arange(1, 300, 2))


def test_disagreement_of_encoder_and_decoder_is_not_shared(directions: Tensor) -> None:
    found = compare.match(sae_of(directions), sae_of(directions, directions.roll(1, 0)))
    assert int(found.shared.sum()) == 0


def test_where_two_want_the_same_partner_the_sum_decides() -> None:
    # Greedily 0 would take 0 (0.95) and leave 1 with 1 (0.6); together 0-1 and 1-0 have more.
    cosines = torch.tensor([[0.95, 0.9], [0.93, 0.6]])
    rows, columns = (index.flatten() for index in torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"))
    a, b = compare._assigned(rows, columns, cosines.flatten(), 2, 2)
    assert dict(zip(a.tolist(), b.tolist(), strict=True)) == {0: 1, 1: 0}


def test_groups_matched_apart_are_the_best_assignment_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    g = torch.Generator().manual_seed(4)
    base = torch.randn(20, 16, generator=g).repeat_interleave(8, 0)
    one, other = (base + 0.8 * torch.randn(160, 16, generator=g) for _ in range(2))
    monkeypatch.setattr(compare, "BLOCK", 48)
    found = compare.match(sae_of(one), sae_of(other))
    unit_one, unit_other = (torch.nn.functional.normalize(x, dim=1) for x in (one, other))
    cosines = unit_one @ unit_other.T
    gain = torch.where(cosines > compare.FLOOR, cosines, 0).double().numpy()
    a, b = optimize.linear_sum_assignment(gain, maximize=True)
    assert float(found.encoder.double().sum()) == pytest.approx(float(gain[a, b].sum()), rel=1e-5)
    assert len(found.b.unique()) == len(found.b)
    assert torch.allclose(found.nearest, cosines.amax(1), atol=1e-5)


def test_saes_of_other_widths_are_not_compared(directions: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^compare: widths 64 and 32"):
        compare.match(sae_of(directions), sae_of(directions[:, :32]))


def test_a_bundle_compared_with_itself_is_the_same() -> None:
    shipped = PRETRAINED / "textbook-lm-layers.2"
    found = compare.report(shipped, shipped)
    assert found.shared == found.latents[0] == 4096
    assert found.shared_share == 1.0
    assert sum(found.histogram) == 4096
    assert all(a == b for a, b, _, _ in found.mapping)


def test_the_command_tells_and_writes_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = str(PRETRAINED / "textbook-lm-layers.2")
    assert main(["sae", "compare", shipped, shipped, "--mapping", str(tmp_path / "mapping.json")]) == 0
    assert "4,096 latents are shared (100.0%)" in capsys.readouterr().out
    mapping = json.loads((tmp_path / "mapping.json").read_bytes())["mapping"]
    assert [pair[:2] for pair in mapping] == [[number, number] for number in range(4096)]
    assert main(["sae", "compare", shipped, str(tmp_path), "--json"]) == 2
    assert capsys.readouterr().err.startswith(f"rudder: {tmp_path}")
