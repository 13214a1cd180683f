"""A store returns the harvested vectors in an order that can be resumed at any batch; a damaged store is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from rudder.sae_models.activations import store, stream
from rudder.sae_models.activations.store import Content, StoreError
from rudder.sae_models.activations.stream import BatchOrder, Vectors
from rudder.sae_models.files import lock_folder
from tests.unit.disk import full_beyond

CONTENT = Content("model", "0", "1", ("layers.0.mlp_in", "layers.1.resid_post"), 8, 0, 1000, "bfloat16")
SITES = CONTENT.sites


class Killed(Exception):
    """Stands for a SIGKILL between two chunks."""


@dataclass
class Numbers:
    """A source of 30 chunks of 35 vectors, each the number of its token; the second site holds the negative."""

    chunk_sizes: Sequence[int] = (35,) * 30
    die_at: int = 1 << 30
    loaded: list[int] = field(default_factory=list)

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Return the numbers at two sites of widths 4 and 3."""
        if chunks[0] >= self.die_at:
            raise Killed
        self.loaded += chunks
        x = torch.cat([torch.arange(35.0 * chunk, 35 * (chunk + 1)) for chunk in chunks])[:, None]
        return {SITES[0]: x.expand(-1, 4), SITES[1]: -x.expand(-1, 3)}


def write_numbers(folder: Path, content: Content = CONTENT) -> store.Store:
    """Write a store of the numbers in shards of at least 100 vectors."""
    return store.write(folder, content, Numbers(), 100)


def first_column(batches: Iterator[Vectors], count: int) -> Tensor:
    """Return the first column of `count` batches; assert that both sites agree."""
    parts = [part for _, part in zip(range(count), batches, strict=False)]
    assert all(torch.equal(part[SITES[0]][:, 0], -part[SITES[1]][:, 0]) for part in parts)
    return torch.cat([part[SITES[0]][:, 0] for part in parts])


def test_store_holds_the_requested_tokens_at_every_site(tmp_path: Path) -> None:
    write_numbers(tmp_path / "store")
    opened = store.load(tmp_path / "store")
    assert opened.tokens == sum(opened.chunk_sizes) == 1000
    assert [shard.tokens for shard in opened.manifest.shards] == [105] * 9 + [55]
    assert opened.chunk_sizes == [35] * 28 + [20]
    vectors = opened.load(range(len(opened.chunk_sizes)))
    expected = torch.arange(1000.0).bfloat16()
    assert torch.equal(vectors[SITES[0]], expected[:, None].expand(-1, 4))
    assert torch.equal(vectors[SITES[1]], -expected[:, None].expand(-1, 3))
    assert all(0 < error < 2e-3 for error in opened.error.values())


def test_int8_has_a_scale_per_token_and_reports_its_error(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=g) * torch.logspace(-2, 2, 200)[:, None]
    tensors = store.quantise("s", x, "int8")
    y = store.dequantise(tensors["s"], tensors["s" + store.SCALE])
    assert tensors["s"].dtype == torch.int8
    assert float((x - y.float()).abs().amax(1).div(x.abs().amax(1)).max()) < 0.5 / 127 + 2**-8
    assert 0 < store.quantisation_error(x, y) < 5e-5
    opened = write_numbers(tmp_path / "store", msgspec.structs.replace(CONTENT, precision="int8"))
    assert torch.allclose(
        opened.load([9, 10, 11])[SITES[0]].float(), torch.arange(315.0, 420)[:, None].expand(-1, 4), rtol=0.01
    )
    assert torch.equal(store.quantise("s", torch.zeros(2, 3), "int8")["s"], torch.zeros(2, 3, dtype=torch.int8))


@pytest.mark.parametrize("die_at", [0, 1, 8, 28])
def test_killed_harvest_resumes_to_the_same_bytes(tmp_path: Path, die_at: int) -> None:
    whole = write_numbers(tmp_path / "whole")
    with pytest.raises(Killed):
        store.write(tmp_path / "killed", CONTENT, Numbers(die_at=die_at), 100)
    (tmp_path / "killed" / "00002.safetensors.partial").write_bytes(b"half a shard")
    if (tmp_path / "killed" / store.MANIFEST).exists():
        with pytest.raises(StoreError, match="is not complete"):
            store.load(tmp_path / "killed")
    second = Numbers()
    resumed = store.write(tmp_path / "killed", CONTENT, second, 100)
    assert resumed.manifest == whole.manifest
    assert second.loaded == list(range(die_at // 3 * 3, 29))
    assert {file.name for file in (tmp_path / "killed").iterdir()} == {file.name for file in whole.path.iterdir()}


def test_writing_a_complete_store_again_harvests_nothing(tmp_path: Path) -> None:
    write_numbers(tmp_path / "store")
    again = Numbers()
    assert store.write(tmp_path / "store", CONTENT, again, 100).tokens == 1000
    assert again.loaded == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_sha256": "9"}, "model_sha256 0, this run needs 9"),
        ({"sites": SITES[:1]}, "sites"),
        ({"seed": 1}, "seed 0, this run needs 1"),
    ],
)
def test_other_content_is_refused_with_the_field_name(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    write_numbers(tmp_path / "store")
    with pytest.raises(StoreError, match=f"^store: {tmp_path / 'store'} has {problem}"):
        store.write(tmp_path / "store", msgspec.structs.replace(CONTENT, **change), Numbers(), 100)


def test_a_store_serves_a_run_that_needs_fewer_tokens_and_is_extended_for_one_that_needs_more(tmp_path: Path) -> None:
    fewer, more = (msgspec.structs.replace(CONTENT, tokens=tokens) for tokens in (210, 1050))
    with lock_folder(tmp_path / "store"), pytest.raises(StoreError, match="another process"):
        write_numbers(tmp_path / "store", fewer)
    source = Numbers(die_at=8)
    with pytest.raises(Killed):
        store.write(tmp_path / "store", CONTENT, source, 100)
    # While it is being written.
    with lock_folder(tmp_path / "store"):
        part = store.write(tmp_path / "store", fewer, Numbers(die_at=0), 100)
    assert part.tokens == 210
    assert part.load(range(6))[SITES[0]][:, 0].tolist() == [*range(210)]
    write_numbers(tmp_path / "store")
    again = Numbers()
    extended = store.write(tmp_path / "store", more, again, 100)
    assert again.loaded == [27, 28, 29]
    assert extended.load(range(30))[SITES[0]][:, 0].float().tolist() == pytest.approx([*range(1050)], rel=0.01)


def test_source_that_ends_early_leaves_an_incomplete_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="gave 1050 tokens, 5000 were requested"):
        write_numbers(tmp_path / "store", msgspec.structs.replace(CONTENT, tokens=5000))
    with pytest.raises(StoreError, match="is not complete"):
        store.load(tmp_path / "store")


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    write_numbers(tmp_path)
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


def test_full_disk_is_one_error_and_the_harvest_resumes_later(tmp_path: Path) -> None:
    big = Numbers((35,) * 300)
    content = msgspec.structs.replace(CONTENT, tokens=10_000)
    problem = r"^store: .*store: File too large; the shards before it are complete"
    with full_beyond(8192), pytest.raises(StoreError, match=problem):
        store.write(tmp_path / "store", content, big, 1000)
    assert list((tmp_path / "store").glob("*.safetensors*")) == []
    assert store.write(tmp_path / "store", content, big, 1000).tokens == 10_000


def test_second_harvest_of_a_folder_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(StoreError, match="another process writes in it"):
        write_numbers(tmp_path)


def test_epoch_has_each_vector_once_and_mixes_distant_vectors(tmp_path: Path) -> None:
    order = BatchOrder(batch_size=32, block_size=300, seed=0)
    first = first_column(stream.batches(Numbers(), order), 32)
    assert len(set(first.tolist())) == 1024
    second = first_column(stream.batches(Numbers(), order, start=32), 32)
    assert not torch.equal(first, second)
    spread = first.view(32, 32).amax(1) - first.view(32, 32).amin(1)
    assert float(spread.median()) > 500
    assert not torch.equal(first, first_column(stream.batches(Numbers(), BatchOrder(32, 300, seed=1)), 32))
    assert first_column(stream.batches(write_numbers(tmp_path), order), 31).unique().numel() > 450


@pytest.mark.parametrize("start", [1, 9, 10, 31, 32, 45, 70])
def test_order_is_the_same_when_resumed_at_any_batch(start: int) -> None:
    order = BatchOrder(batch_size=32, block_size=300, seed=5)
    whole = first_column(stream.batches(Numbers(), order), 80)
    assert torch.equal(first_column(stream.batches(Numbers(), order, start), 80 - start), whole[32 * start :])


def test_at_most_one_block_is_in_memory() -> None:
    source = Numbers()
    for number, _ in zip(
        range(32), stream.batches(source, BatchOrder(batch_size=32, block_size=140, seed=0)), strict=False
    ):
        assert 35 * len(source.loaded) <= 32 * (number + 1) + 140 + 35


def test_source_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch: 2000 vectors, the data hold 1050"):
        next(stream.batches(Numbers(), BatchOrder(2000, 100, 0)))


def test_prefetch_yields_the_same_batches_and_raises_errors() -> None:
    order = BatchOrder(32, 300, 0)
    plain, ahead = stream.batches(Numbers(), order), stream.prefetch(stream.batches(Numbers(), order))
    assert torch.equal(first_column(ahead, 40), first_column(plain, 40))
    assert list(stream.prefetch(iter([{}, {}]))) == [{}, {}]
    with pytest.raises(Killed):
        list(stream.prefetch(stream.batches(Numbers(die_at=5), order)))
