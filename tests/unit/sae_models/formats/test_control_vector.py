"""Control vectors survive write and read, in the file format of repeng and llama.cpp."""

import struct
from pathlib import Path

import pytest
import torch

from rudder.sae_models.formats import control_vector
from rudder.sae_models.formats.source import FormatError
from tests.unit.bounded import refused

VECTORS = {1: torch.tensor([1.0, -2.0, 0.5]), 7: torch.tensor([0.0, 1e-9, 3e7]), 12: torch.ones(3)}


def string(content: str) -> bytes:
    """Return a GGUF string."""
    return struct.pack("<Q", len(content)) + content.encode()


def gguf_by_hand(alignment: int, half: bool = False) -> bytes:
    """Return a file with fields of many types, directions out of order and data in another order."""
    fields = [
        string("general.architecture") + struct.pack("<I", 8) + string("controlvector"),
        string("controlvector.model_hint") + struct.pack("<I", 8) + string("mistral"),
        string("controlvector.layer_count") + struct.pack("<II", 4, 2),
        string("general.alignment") + struct.pack("<II", 4, alignment),
        string("a") + struct.pack("<If", 6, 0.5) + string("b") + struct.pack("<IB", 7, 1),
        string("c") + struct.pack("<IIQ3h", 9, 3, 3, 1, 2, 3),
        string("d") + struct.pack("<IIQ", 9, 8, 2) + string("x") + string("yz"),
    ]
    kind, letter = (1, "e") if half else (0, "f")
    infos = string("direction.12") + struct.pack("<IQIQ", 1, 3, kind, alignment)
    infos += string("direction.0") + struct.pack("<IQIQ", 1, 3, kind, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 8) + b"".join(fields) + infos
    first, second = struct.pack(f"<3{letter}", 1.0, -2.0, 0.5), struct.pack(f"<3{letter}", 4.0, 5.0, 6.0)
    body = first.ljust(alignment, b"\0") + second
    return header.ljust(-(-len(header) // alignment) * alignment, b"\0") + body


def test_write_and_read_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "v.gguf"
    control_vector.write(file, VECTORS, "llama")
    directions = control_vector.read(file)
    assert list(directions) == [1, 7, 12]
    assert all(torch.equal(directions[layer], VECTORS[layer]) for layer in VECTORS)
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_write_declares_architecture_model_and_layers_and_aligns(tmp_path: Path) -> None:
    control_vector.write(tmp_path / "v.gguf", VECTORS, "llama")
    content = (tmp_path / "v.gguf").read_bytes()
    assert content[:24] == b"GGUF" + struct.pack("<IQQ", 3, 3, 3)
    assert string("controlvector.model_hint") + struct.pack("<I", 8) + string("llama") in content
    assert string("controlvector.layer_count") + struct.pack("<II", 4, 3) in content
    assert string("direction.7") + struct.pack("<IQIQ", 1, 3, 0, 32) in content
    assert len(content) % 32 == 0
    assert content[-96:-84] == struct.pack("<3f", 1.0, -2.0, 0.5)


@pytest.mark.parametrize("alignment", [16, 32, 64])
@pytest.mark.parametrize("half", [False, True])
def test_files_of_other_writers_are_read(alignment: int, half: bool, tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(gguf_by_hand(alignment, half))
    directions = control_vector.read(tmp_path / "v.gguf")
    assert {layer: vector.tolist() for layer, vector in directions.items()} == {
        12: [4.0, 5.0, 6.0],
        0: [1.0, -2.0, 0.5],
    }
    assert all(vector.dtype == torch.float32 for vector in directions.values())


def test_invalid_alignment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(gguf_by_hand(24))
    with pytest.raises(FormatError, match=r"v\.gguf general\.alignment: 24"):
        control_vector.read(tmp_path / "v.gguf")


def test_write_refuses_invalid_vectors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="direction"):
        control_vector.write(tmp_path / "v.gguf", {1: torch.ones(3), 2: torch.ones(4)}, "llama")
    with pytest.raises(FormatError, match="not finite"):
        control_vector.write(tmp_path / "v.gguf", {1: torch.tensor([float("nan")])}, "llama")
    assert list(tmp_path.iterdir()) == []


def gguf(tensors: int = 1, fields: int = 1, *parts: bytes) -> bytes:
    """Return a GGUF file with any content."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)


ARCHITECTURE = string("general.architecture") + struct.pack("<I", 8) + string("controlvector")


def vector(name: str = "direction.1", width: int = 4, kind: int = 0, offset: int = 0, dimensions: int = 1) -> bytes:
    """Return a tensor's header in a GGUF file."""
    return string(name) + struct.pack("<IQIQ", dimensions, width, kind, offset)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (gguf(1 << 60), "tensors and 1 fields"),
        (gguf(1, 1 << 60), "1 tensors and"),
        (gguf(1, 1, struct.pack("<Q", 1 << 60)), "a string of"),
        (gguf(1, 1, string("a") + struct.pack("<IIQ", 9, 4, 1 << 60)), "an array of"),
        (gguf(1, 1, string("a") + struct.pack("<IIQ", 9, 9, 1)), "an array of"),
        (gguf(1, 1, string("a") + struct.pack("<I", 99)), "a field of type 99"),
        (gguf(1, 0, vector()), "architecture None"),
        (gguf(1, 1, ARCHITECTURE, vector(width=1 << 60)), "a tensor of type 0 and width"),
        (gguf(1, 1, ARCHITECTURE, vector(kind=2)), "a tensor of type 2"),
        (gguf(1, 1, ARCHITECTURE, vector(dimensions=2)), "a tensor of 2 dimensions"),
        (gguf(1, 1, ARCHITECTURE, vector(offset=1 << 60)), "direction.1: extends past the end"),
        (gguf(1, 1, ARCHITECTURE, vector("direction.-1")), "not direction.L"),
        (gguf(1, 1, ARCHITECTURE, vector("direction." + "9" * 400)), "not direction.L"),
        (gguf(1, 1, ARCHITECTURE, vector(width=40), bytes(100)), "too early"),
        (gguf(0, 1, ARCHITECTURE), "0 directions"),
        (gguf(2, 1, ARCHITECTURE, vector(), vector(), bytes(100)), "2 directions of 1 layers"),
        (gguf(2, 1, ARCHITECTURE, vector(), vector("direction.2", 5), bytes(100)), r"of widths [4, 5]"),
        (gguf(1, 1, ARCHITECTURE, vector(), b"\xff" * 100), "not finite"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1"),
        (b"PK\x03\x04" + bytes(100), "not GGUF"),
    ],
)
def test_inconsistent_control_vectors_are_refused(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(content)
    assert why in refused(control_vector.read, tmp_path / "v.gguf")
