"""What is harvested comes back from disk, in an order that can be entered anywhere; a damaged store does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from rudder.sae_models.activations import store, stream
from rudder.sae_models.activations.store import Content, StoreError
from rudder.sae_models.activations.stream import Order, Vectors
from rudder.sae_models.files import locked
from tests.unit.disk import full_beyond

CONTENT = Content("model", "0", "1", ("layers.0.mlp_in", "layers.1.resid_post"), 8, 0, 1000, "bfloat16")
SITES = CONTENT.sites


class Killed(Exception):
    """Stands for a kill between two chunks."""


@dataclass
class Numbers:
    """A source of 30 chunks of 35 vectors, each the number of its token; the second site holds the negative."""

    sizes: Sequence[int] = (35,) * 30
    die_at: int = 1 << 30
    asked: list[int] = field(default_factory=list)

    def load(self, chunks: Sequence[int]) -> Vectors:
        """The numbers, in two sites of widths 4 and 3."""
        if chunks[0] >= self.die_at:
            raise Killed
        self.asked += chunks
        x = torch.cat([torch.arange(35.0 * chunk, 35 * (chunk + 1)) for chunk in chunks])[:, None]
        return {SITES[0]: x.expand(-1, 4), SITES[1]: -x.expand(-1, 3)}


def written(folder: Path, content: Content = CONTENT) -> store.Store:
    """A store of the numbers in shards of at least 100."""
    return store.write(folder, content, Numbers(), 100)


def numbers(found: Iterator[Vectors], count: int) -> Tensor:
    """The first column of `count` batches, which must agree at both sites."""
    parts = [part for _, part in zip(range(count), found, strict=False)]
    assert all(torch.equal(part[SITES[0]][:, 0], -part[SITES[1]][:, 0]) for part in parts)
    return torch.cat([part[SITES[0]][:, 0] for part in parts])


def test_a_store_holds_what_was_asked_for_at_every_site(tmp_path: Path) -> None:
    written(tmp_path / "store")
    opened = store.load(tmp_path / "store")
    assert opened.tokens == sum(opened.sizes) == 1000
    assert [shard.tokens for shard in opened.manifest.shards] == [105] * 9 + [55]
    assert opened.sizes == [35] * 28 + [20]
    found = opened.load(range(len(opened.sizes)))
    expected = torch.arange(1000.0).bfloat16()
    assert torch.equal(found[SITES[0]], expected[:, None].expand(-1, 4))
    assert torch.equal(found[SITES[1]], -expected[:, None].expand(-1, 3))
    assert all(0 < error < 2e-3 for error in opened.error.values())


def test_int8_has_a_scale_for_each_token_and_reports_its_error(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=g) * torch.logspace(-2, 2, 200)[:, None]
    tensors = store.quantised("s", x, "int8")
    y = store.restored(tensors["s"], tensors["s" + store.SCALE])
    assert tensors["s"].dtype == torch.int8
    assert float((x - y.float()).abs().amax(1).div(x.abs().amax(1)).max()) < 0.5 / 127 + 2**-8
    assert 0 < store.lost(x, y) < 5e-5
    opened = written(tmp_path / "store", msgspec.structs.replace(CONTENT, precision="int8"))
    assert torch.allclose(
        opened.load([9, 10, 11])[SITES[0]].float(), torch.arange(315.0, 420)[:, None].expand(-1, 4), rtol=0.01
    )
    assert torch.equal(store.quantised("s", torch.zeros(2, 3), "int8")["s"], torch.zeros(2, 3, dtype=torch.int8))


@pytest.mark.parametrize("die_at", [0, 1, 8, 28])
def test_a_killed_harvest_goes_on_and_gives_the_same_bytes(tmp_path: Path, die_at: int) -> None:
    whole = written(tmp_path / "whole")
    with pytest.raises(Killed):
        store.write(tmp_path / "killed", CONTENT, Numbers(die_at=die_at), 100)
    (tmp_path / "killed" / "00002.safetensors.partial").write_bytes(b"half a shard")
    if (tmp_path / "killed" / store.MANIFEST).exists():
        with pytest.raises(StoreError, match="is not complete"):
            store.load(tmp_path / "killed")
    second = Numbers()
    resumed = store.write(tmp_path / "killed", CONTENT, second, 100)
    assert resumed.manifest == whole.manifest
    assert second.asked == list(range(die_at // 3 * 3, 29))
    assert {file.name for file in (tmp_path / "killed").iterdir()} == {file.name for file in whole.path.iterdir()}


def test_writing_a_whole_store_again_harvests_nothing(tmp_path: Path) -> None:
    written(tmp_path / "store")
    again = Numbers()
    assert store.write(tmp_path / "store", CONTENT, again, 100).tokens == 1000
    assert again.asked == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_sha256": "9"}, "model_sha256 0, this run needs 9"),
        ({"sites": SITES[:1]}, "sites"),
        ({"seed": 1}, "seed 0, this run needs 1"),
    ],
)
def test_another_content_is_refused_by_the_field(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    written(tmp_path / "store")
    with pytest.raises(StoreError, match=f"^store: {tmp_path / 'store'} has {problem}"):
        store.write(tmp_path / "store", msgspec.structs.replace(CONTENT, **change), Numbers(), 100)


def test_a_source_that_ends_early_leaves_no_store_that_looks_whole(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="gave 1050 tokens, 5000 were asked for"):
        written(tmp_path / "store", msgspec.structs.replace(CONTENT, tokens=5000))
    with pytest.raises(StoreError, match="is not complete"):
        store.load(tmp_path / "store")


def test_damage_is_found_and_the_file_named(tmp_path: Path) -> None:
    written(tmp_path)
    shard = tmp_path / "00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=rf"^store: {shard} has {len(content) - 1} bytes .* it is cut short"):
        store.load(tmp_path)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    opened = store.load(tmp_path)
    opened.load([0])
    with pytest.raises(StoreError, match=f"^store: {shard}: the content does not have the SHA-256"):
        opened.load([9])
    shard.unlink()
    with pytest.raises(StoreError, match=f"^store: {shard} is missing"):
        store.load(tmp_path)
    (tmp_path / store.MANIFEST).write_bytes(b"{")
    with pytest.raises(StoreError, match=f"^store: {tmp_path / store.MANIFEST}: "):
        store.load(tmp_path)


def test_a_full_disk_is_one_clear_error_and_the_harvest_goes_on_later(tmp_path: Path) -> None:
    big = Numbers((35,) * 300)
    content = msgspec.structs.replace(CONTENT, tokens=10_000)
    problem = r"^store: .*store: File too large; the shards before it are whole"
    with full_beyond(8192), pytest.raises(StoreError, match=problem):
        store.write(tmp_path / "store", content, big, 1000)
    assert list((tmp_path / "store").glob("*.safetensors*")) == []
    assert store.write(tmp_path / "store", content, big, 1000).tokens == 10_000


def test_two_harvests_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StoreError, match="another process writes in it"):
        written(tmp_path)


def test_a_pass_has_each_vector_once_and_mixes_far_ones(tmp_path: Path) -> None:
    order = Order(batch=32, block=300, seed=0)
    first = numbers(stream.batches(Numbers(), order), 32)
    assert len(set(first.tolist())) == 1024
    second = numbers(stream.batches(Numbers(), order, start=32), 32)
    assert not torch.equal(first, second)
    spread = first.view(32, 32).amax(1) - first.view(32, 32).amin(1)
    assert float(spread.median()) > 500
    assert not torch.equal(first, numbers(stream.batches(Numbers(), Order(32, 300, seed=1)), 32))
    assert numbers(stream.batches(written(tmp_path), order), 31).unique().numel() > 500


@pytest.mark.parametrize("start", [1, 9, 10, 31, 32, 45, 70])
def test_the_order_is_the_same_wherever_it_is_entered(start: int) -> None:
    order = Order(batch=32, block=300, seed=5)
    whole = numbers(stream.batches(Numbers(), order), 80)
    assert torch.equal(numbers(stream.batches(Numbers(), order, start), 80 - start), whole[32 * start :])


def test_more_than_a_block_is_never_held() -> None:
    source = Numbers()
    for number, _ in zip(range(32), stream.batches(source, Order(batch=32, block=140, seed=0)), strict=False):
        assert 35 * len(source.asked) <= 32 * (number + 1) + 140 + 35


def test_data_smaller_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch: 2000 vectors, the data hold 1050"):
        next(stream.batches(Numbers(), Order(2000, 100, 0)))


def test_prefetching_changes_nothing_and_passes_errors_on() -> None:
    order = Order(32, 300, 0)
    plain, ahead = stream.batches(Numbers(), order), stream.prefetched(stream.batches(Numbers(), order))
    assert torch.equal(numbers(ahead, 40), numbers(plain, 40))
    assert list(stream.prefetched(iter([{}, {}]))) == [{}, {}]
    with pytest.raises(Killed):
        list(stream.prefetched(stream.batches(Numbers(die_at=5), order)))
