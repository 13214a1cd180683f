"""GGUF files, however damaged, are read or refused by name, quickly and in little memory."""

import random
import struct
import time
from pathlib import Path

import pytest

from rudder.server.models.convert import write_model
from rudder.server.models.gguf_file import ModelFileError, read
from tests.unit.bounded import MEMORY, SECONDS, peak, reset_peak
from tests.unit.gguf_files import Shape, tiny_llama

SMALL = Shape(layers=1, width=32, inner=32)


def test_values_have_their_types(tmp_path: Path) -> None:
    file = read(tiny_llama().write(tmp_path / "model.gguf"))
    assert file.value("llama.block_count", int) == 2
    assert file.value("general.architecture", str) == "llama"
    assert file.value("llama.absent", int, 7) == 7
    assert file.values("tokenizer.ggml.token_type", int)[:4] == [3, 3, 3, 1]
    assert file.shape("blk.0.ffn_down.weight") == file.tensor("blk.0.ffn_down.weight").shape == (32, 64)
    with pytest.raises(ModelFileError, match=r"model\.gguf: llama\.absent is missing"):
        file.value("llama.absent", int)
    with pytest.raises(ModelFileError, match=r"model\.gguf: general.architecture is 'llama', not of type int"):
        file.value("general.architecture", int)
    with pytest.raises(ModelFileError, match=r"model.gguf: tokenizer.ggml.tokens has items that are not of type int"):
        file.values("tokenizer.ggml.tokens", int)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\3\4 a zip file", "is not a GGUF file"),
        (b"GGUF", "cannot be read as GGUF: ends at byte 4, too early"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "cannot be read as GGUF: .*version 9"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is in the byte order of another processor"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), "cannot be read as GGUF: ends at byte 24, too early"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "cannot be read as GGUF: ends at byte 24, too early"),
        # An array that claims 2^60 numbers, and a text that claims 2^60 bytes.
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 1 << 60), "cannot be read as GGUF: ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"a", 8, 1 << 60), "cannot be read as GGUF: ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), r"cannot be read as GGUF: .*77\b.* is not a valid"),
        (
            b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 5000,
            "cannot be read as GGUF: .*recursion",
        ),
    ],
    ids=range(11),
)
def test_other_content_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=f"^model.gguf: {problem}"):
        read(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tiny_llama(SMALL).write(tmp_path / "model.gguf")
    whole = path.read_bytes()
    for length in range(0, len(whole) - 32, 4999):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=r"^model.gguf: (is not a|cannot be read as) GGUF"):
            read(path)


@pytest.mark.parametrize("seed", range(24))
def test_mutated_files_are_converted_or_refused(seed: int, tmp_path: Path) -> None:
    path = tiny_llama(SMALL).write(tmp_path / "model.gguf")
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(rng.choice((1, 4))):
        at = rng.randrange(rng.choice((200, 1500, len(content) - 8)))
        content[at : at + 8] = rng.choice((rng.randbytes(8), b"\xff" * 8, bytes(8)))
    path.write_bytes(content)
    (tmp_path / "out").mkdir()
    reset_peak()
    before, start = peak(), time.process_time()
    try:
        write_model(read(path), tmp_path / "out")
    except ModelFileError as error:
        assert str(error).startswith("model.gguf: ")  # noqa: PT017
    assert time.process_time() - start < SECONDS
    assert peak() - before < MEMORY
