"""Every file, however damaged or hostile, is read correctly or refused by name, quickly and in little memory.

The environment variable FUZZ_SEEDS is the number of mutations of each checkpoint.
"""

import json
import os
import pickle
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rudder.sae_models.formats import control_vector
from rudder.sae_models.formats.source import FormatError
from rudder.sae_models.formats.tensors import (
    orient,
    read_json,
    read_npz,
    read_pickle,
    read_safetensors,
    read_yaml,
    state_dict,
    take,
)
from tests.unit.bounded import attempt, refused
from tests.unit.checkpoints import ALL, LATENTS, WIDTH, Draw, rewrite

SEEDS = int(os.environ.get("FUZZ_SEEDS", "12"))
HUGE = (b"\xff" * 8, b"\xff\xff\xff\x7f\0\0\0\0", b"\0\0\0\0\0\1\0\0", struct.pack("<d", 1e300))


def flip(content: bytearray, rng: random.Random) -> None:
    """Flip one bit."""
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_early(content: bytearray, rng: random.Random) -> None:
    """Change some bytes near the beginning, which is usually a header."""
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(min(len(content), 256))] = rng.randrange(256)


def truncate(content: bytearray, rng: random.Random) -> None:
    """Cut off the end."""
    del content[rng.randrange(len(content)) :]


def enlarge(content: bytearray, rng: random.Random) -> None:
    """Replace eight bytes by a huge number."""
    at = rng.randrange(max(1, len(content) - 8))
    content[at : at + 8] = rng.choice(HUGE)


def exchange_digits(content: bytearray, rng: random.Random) -> None:
    """Replace a digit of a number in text."""
    digits = [at for at, byte in enumerate(content) if 48 <= byte < 58]
    content[rng.choice(digits or [0])] = rng.choice(b"0123456789-e")


def repeat(content: bytearray, rng: random.Random) -> None:
    """Duplicate a piece."""
    at, length = rng.randrange(len(content)), rng.randint(1, 64)
    content[at:at] = content[at : at + length]


def blank(content: bytearray, rng: random.Random) -> None:
    """Overwrite a piece with zeros."""
    at, length = rng.randrange(len(content)), rng.randint(1, 64)
    content[at : at + length] = bytes(len(content[at : at + length]))


MUTATIONS = (flip, flip_early, truncate, enlarge, exchange_digits, repeat, blank)


def mutated(whole: bytes, seed: str) -> bytes:
    """Return a file's content with one or three mutations."""
    rng, content = random.Random(seed), bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 3))):
        if content:
            rng.choice(MUTATIONS)(content, rng)
    return bytes(content)


def fuzz(name: str, home: Path, seeds: Iterable[int]) -> Counter[str]:
    """Read a checkpoint with mutations of its files in turn; count the outcomes `read` and `refused`.

    Assert that what is read has the right shape and is finite, and that files with checksums are undamaged.
    """
    checkpoint = ALL[name](home, Draw())
    whole = {file: file.read_bytes() for file in sorted(home.rglob("*")) if file.is_file()}
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        file = sorted(whole)[seed % len(whole)]
        file.write_bytes(mutated(whole[file], f"{name} {seed}"))
        attempt(checkpoint.format.recognise, checkpoint.path)
        outcome = attempt(checkpoint.format.read, checkpoint.path)
        outcomes["refused" if isinstance(outcome, FormatError) else "read"] += 1
        if not isinstance(outcome, FormatError):
            sae, _ = outcome
            f = sae.encode(checkpoint.x)
            assert f.shape == checkpoint.f.shape
            assert all(bool(part.isfinite().all()) for part in (sae.encoder, sae.bias, sae.threshold, sae.decoder))
            assert file.suffix not in (".pt", ".pth", ".npz") or torch.allclose(f, checkpoint.f, atol=1e-3)
        file.write_bytes(whole[file])
    return outcomes


def fuzz_control_vectors(home: Path, seeds: Iterable[int]) -> Counter[str]:
    """Fuzz control vectors, which have no checksums."""
    file = home / "v.gguf"
    control_vector.write(file, {layer: torch.randn(WIDTH) for layer in (1, 2, 5)}, "llama")
    whole, outcomes = file.read_bytes(), Counter[str]()
    for seed in seeds:
        file.write_bytes(mutated(whole, f"gguf {seed}"))
        outcome = attempt(control_vector.read, file)
        outcomes["refused" if isinstance(outcome, FormatError) else "read"] += 1
        assert isinstance(outcome, FormatError) or all(bool(vector.isfinite().all()) for vector in outcome.values())
    return outcomes


@pytest.mark.parametrize("name", ALL)
def test_mutated_checkpoint_is_read_correctly_or_refused(name: str, tmp_path: Path) -> None:
    assert fuzz(name, tmp_path, range(SEEDS))["refused"] > SEEDS / 4


def test_mutated_control_vector_is_read_correctly_or_refused(tmp_path: Path) -> None:
    assert fuzz_control_vectors(tmp_path, range(4 * SEEDS))["refused"] > SEEDS


def safetensors(file: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file with any header."""
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return file


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2, 3), offsets: tuple[int, int] = (0, 24)) -> bytes:
    """Return a header with one tensor."""
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("header", "length", "why"),
    [
        (entry(), 1 << 62, "header of 4611686018427387904 bytes"),
        (entry(), 4000, "header of 4000 bytes"),
        (b" " * (2 << 20), None, "header of 2097152 bytes"),
        (b"[" * 100_000, None, ""),
        (b"\xff\xfe", None, ""),
        (entry("F8_E4M3", (24,)), None, "w: dtype F8_E4M3"),
        (entry(shape=(2, -3)), None, "w: bytes 0 to 24"),
        (entry(shape=(1 << 40, 1 << 40)), None, "w: 24 bytes for F32"),
        (entry(offsets=(0, 1 << 40), shape=(1 << 38,)), None, "w: bytes 0 to 1099511627776 of 24"),
        (entry(offsets=(24, 0)), None, "w: bytes 24 to 0"),
        (entry(shape=(2, 2), offsets=(8, 24)), None, ""),
    ],
)
def test_inconsistent_safetensors_headers_are_refused(
    header: bytes, length: int | None, why: str, tmp_path: Path
) -> None:
    file = safetensors(tmp_path / "w.safetensors", header, bytes(24), length)
    assert why in refused(read_safetensors, file)


def test_every_reader_refuses_an_empty_or_missing_file(tmp_path: Path) -> None:
    for read in (read_safetensors, read_pickle, read_npz, read_json, read_yaml, control_vector.read):
        (tmp_path / "empty").write_bytes(b"")
        refused(read, tmp_path / "empty")
        refused(read, tmp_path / "none")


def npz(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write an npz with any members."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def npy(array: np.ndarray[Any, Any], shape: tuple[int, ...] | None = None) -> bytes:
    """Return a npy file, with `shape` in its header in place of the array's own."""
    header = repr({"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}).encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + array.tobytes()


@pytest.mark.parametrize("name", ["../w.npy", "/tmp/w.npy", "a/../../w.npy", "..\\w.npy"])
def test_member_names_that_escape_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    file = npz(tmp_path / "w.npz", {name: npy(np.ones(3, np.float32))})
    assert "a member is named" in refused(read_npz, file)


def test_npz_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    bomb = npz(tmp_path / "w.npz", {"w.npy": npy(np.zeros(32 << 20, np.float32))}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    assert "expand to 134217" in refused(read_npz, bomb)


def test_inconsistent_npz_arrays_are_refused(tmp_path: Path) -> None:
    ones = np.ones((2, 3), np.float32)
    lying = npz(tmp_path / "w.npz", {"w.npy": npy(ones, (1 << 20, 1 << 20))})
    assert "shape (1048576, 1048576)" in refused(read_npz, lying)
    assert "dtype object" in refused(read_npz, npz(tmp_path / "w.npz", {"w.npy": npy(np.array([None]))}))
    assert "dtype >f4" in refused(read_npz, npz(tmp_path / "w.npz", {"w.npy": npy(ones.astype(">f4"))}))
    assert "dtype complex64" in refused(read_npz, npz(tmp_path / "w.npz", {"w.npy": npy(ones.astype("c8"))}))
    content = bytearray(npz(tmp_path / "w.npz", {"w.npy": npy(ones)}).read_bytes())
    content[content.index(b"\x00\x00\x80\x3f")] ^= 1
    (tmp_path / "w.npz").write_bytes(content)
    assert "CRC" in refused(read_npz, tmp_path / "w.npz")


def number(value: int) -> bytes:
    """Pickle an integer."""
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(values: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Return the pickle of {"w": a float32 tensor} in torch's format."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpu" + number(values) + b"tQ"
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, stride)) + b"t"
    arguments = storage + number(offset) + shape + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


def torch_file(file: Path, pickled: bytes, data: bytes = bytes(24), compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a torch file with any pickle."""
    members = {"w/data.pkl": pickled, "w/byteorder": b"little", "w/version": b"3\n", "w/data/0": data}
    return npz(file, members, compression)


def read_w(path: Path) -> torch.Tensor:
    """Read the tensor "w" of a torch file."""
    return take(state_dict(read_pickle(path), path.name), "w", path.name)


def test_torch_file_by_hand_is_read(tmp_path: Path) -> None:
    data = struct.pack("<6f", *range(6))
    file = torch_file(tmp_path / "w.pt", tensor(6, (2, 3), (3, 1)), data)
    assert read_w(file).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("pickled", "why"),
    [
        (tensor(1 << 40, (2, 3), (3, 1)), "data/0: 24 bytes, 4398046511104 are declared"),
        (tensor(-6, (2, 3), (3, 1)), "data/0: 24 bytes, -24 are declared"),
        (tensor(6, (1 << 20, 1 << 20), (1 << 20, 1)), ""),
        (tensor(6, (2, 4), (4, 1)), ""),
        (tensor(6, (2, 3), (3, 1), -1), ""),
        (tensor(6, (2, 3), (3, 1), 1), ""),
        (tensor(6, (1 << 20, 1 << 20), (0, 0)), "w: shape (1048576, 1048576), the file holds less"),
        (b"\x80\x02}X\1\0\0\0wcbuiltins\nbytearray\n" + number(1 << 40) + b"\x85Rs.", "refers to builtins bytearray"),
        (b"\x80\x02}X\1\0\0\0wctorch\nFloatTensor\n" + number(1 << 40) + b"\x85Rs.", "refers to torch FloatTensor"),
        (b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns.", "59 times to its tuples"),
        (b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b".", ""),
        (b"\x80\x02}X\1\0\0\0w" + b"a" * 1000, ""),
    ],
)
def test_inconsistent_or_calling_pickles_are_refused(pickled: bytes, why: str, tmp_path: Path) -> None:
    assert why in refused(read_w, torch_file(tmp_path / "w.pt", pickled))


def test_pickles_cannot_run_code(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    assert "refers to posix mkdir" in refused(read_w, torch_file(tmp_path / "w.pt", pickle.dumps({"w": Touch()}, 2)))
    assert not (tmp_path / "ran").exists()


def test_torch_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    bomb = torch_file(tmp_path / "w.pt", tensor(6, (2, 3), (3, 1)), compression=zipfile.ZIP_DEFLATED)
    assert "compressed members" in refused(read_pickle, bomb)
    short = torch_file(tmp_path / "w.pt", tensor(6, (2, 3), (3, 1)), bytes(10))
    assert "data/0: 10 bytes, 24 are declared" in refused(read_pickle, short)
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "not a whole torch file of version 1.6" in refused(read_pickle, tmp_path / "old.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[content.index(b"\x00\x00\x80\x3f")] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    assert "checksum" in refused(read_pickle, tmp_path / "w.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_non_finite_values_are_refused(name: str, value: float, tmp_path: Path) -> None:
    checkpoint = ALL[name](tmp_path, Draw())

    def spoil(content: dict[str, Any]) -> dict[str, Any]:
        key = next(key for key in content if "dec" in key or key == "W_D")
        content[key].view(-1)[-1] = value
        return content

    rewrite(checkpoint.file, spoil)
    message = str(attempt(checkpoint.format.read, checkpoint.path))
    assert checkpoint.file.name in message
    assert "values that are not finite" in message


def test_one_non_finite_value_in_a_large_matrix_is_refused() -> None:
    large = torch.zeros(3000, 3000)
    for transposed in (large, large.T):
        assert take({"w": transposed}, "w", "f") is not None
    large[2999, 1] = float("nan")
    for transposed in (large, large.T):
        with pytest.raises(FormatError, match="f w: has values that are not finite"):
            take({"w": transposed}, "w", "f")


def test_overflowing_sums_are_not_non_finite_values() -> None:
    huge = torch.full((100,), 60000.0, dtype=torch.float16)
    assert torch.equal(take({"w": huge}, "w", "f"), huge)


def test_orientation_follows_the_shape_and_a_square_is_refused() -> None:
    matrix = torch.randn(LATENTS, WIDTH)
    assert torch.equal(orient(matrix, LATENTS, WIDTH, "w"), matrix)
    assert torch.equal(orient(matrix.T, LATENTS, WIDTH, "w"), matrix)
    with pytest.raises(FormatError, match="w: is square"):
        orient(torch.eye(3), 3, 3, "w")
    with pytest.raises(FormatError, match=r"w: shape \(24, 6\), neither"):
        orient(matrix, LATENTS, WIDTH + 1, "w")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        '"a"',
        "{",
        f'{{"a": {"9" * 5000}}}',
        " " * (5 << 20),
        "\x00",
        "\ud800",
    ],
)
def test_json_settings_must_be_a_small_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(read_json, tmp_path / "c.json")


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvw")),
        "a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
        "!!python/object/apply:os.mkdir [ran]",
        "[" * 30_000,
        "- " * 30_000,
        "- a",
        "x" * (1 << 20),
        "a: b: c",
        "\x00",
    ],
)
def test_yaml_settings_must_be_a_small_mapping(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    refused(read_yaml, tmp_path / "c.yaml")


def test_yaml_values_stay_strings(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("1: a\nb: 2020-99-99\nc: !!int x\nd: [0b_, on]\n")
    assert read_yaml(tmp_path / "c.yaml") == {"1": "a", "b": "2020-99-99", "c": "x", "d": ["0b_", "on"]}
