"""Control vectors of repeng and llama.cpp: a GGUF file of architecture `controlvector`, tensors `direction.{L}` [d].

Both add direction L to the output of block L, counted from 0, which is the site `layers.{L}.resid_post`. repeng also
extracts it there; llama.cpp's own generator extracts it at the output of block L - 1, and llama.cpp refuses a file with
block 0. The container is little-endian GGUF, version 2 or 3.
"""

import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.formats.source import FormatError
from rudder.sae_models.formats.tensors import all_finite

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ARCHITECTURE = "controlvector"
# Caps far above the layers of any model and the metadata of any control vector.
TENSORS_LIMIT = 4096
FIELDS_LIMIT = 1024
TEXT_LIMIT = 1 << 16
WIDTH_LIMIT = 1 << 20

UINT32, STRING, ARRAY = 4, 8, 9
# GGUF's type id -> struct's format character, for numeric types.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = {0: torch.float32, 1: torch.float16}


class Info(NamedTuple):
    """Width d, dtype and offset, from the start of the data, of a tensor."""

    width: int
    dtype: torch.dtype
    offset: int


def read(path: Path) -> dict[int, Tensor]:
    """Read directions [d] by layer, float32. FormatError: not a control vector, or inconsistent with its header."""
    try:
        with path.open("rb") as file:
            return read_directions(file, path)
    except (OSError, UnicodeDecodeError, struct.error) as error:
        raise FormatError(f"{path.name}: {error}") from error


def read_directions(file: BinaryIO, path: Path) -> dict[int, Tensor]:
    """Read the directions of an open file."""
    magic, version = read_exactly(file, 4, path), read_number(file, "I", path)
    if magic != MAGIC or version not in (2, VERSION):
        raise FormatError(f"{path.name}: starts with {magic!r} and version {version}, not GGUF of version 2 or 3")
    tensors, fields = read_number(file, "Q", path), read_number(file, "Q", path)
    if tensors > TENSORS_LIMIT or fields > FIELDS_LIMIT:
        raise FormatError(f"{path.name}: {tensors} tensors and {fields} fields")
    metadata = {read_text(file, path): read_value(file, path) for _ in range(fields)}
    if metadata.get("general.architecture") != ARCHITECTURE:
        raise FormatError(f"{path.name}: architecture {metadata.get('general.architecture')!r}, not {ARCHITECTURE}")
    infos = [(read_text(file, path), read_info(file, path)) for _ in range(tensors)]
    start = align(file.tell(), alignment_of(metadata, path))
    directions = {layer_of(name, path): read_data(file, start, info, name, path) for name, info in infos}
    widths = {info.width for _, info in infos}
    if not directions or len(directions) < len(infos) or len(widths) > 1:
        problem = f"{len(infos)} directions of {len(directions)} layers, of widths {sorted(widths)}"
        raise FormatError(f"{path.name}: {problem}")
    return directions


def write(path: Path, vectors: Mapping[int, Tensor], model: str) -> None:
    """Write directions [d] by layer for a model (its type, such as `llama`), atomically and verified by reading."""
    names = {f"direction.{layer}": vector.detach().float().contiguous() for layer, vector in sorted(vectors.items())}
    header = MAGIC + struct.pack("<IQQ", VERSION, len(names), 3)
    for key, content in (("general.architecture", ARCHITECTURE), (f"{ARCHITECTURE}.model_hint", model)):
        header += pack_string(key) + struct.pack("<I", STRING) + pack_string(content)
    header += pack_string(f"{ARCHITECTURE}.layer_count") + struct.pack("<II", UINT32, len(names))
    body = b""
    for name, vector in names.items():
        header += pack_string(name) + struct.pack("<IQIQ", 1, len(vector), 0, len(body))
        body += pad(vector.numpy().astype("<f4").tobytes())
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        file.write_bytes(pad(header) + body)
        read(file)
        file.replace(path)


def pack_string(content: str) -> bytes:
    """Return a GGUF string: its length in bytes and its content."""
    encoded = content.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def pad(content: bytes) -> bytes:
    """Pad content with zeros to the next aligned position."""
    return content + bytes(align(len(content), ALIGNMENT) - len(content))


def align(position: int, alignment: int) -> int:
    """Round a position up to a multiple of the alignment."""
    return -(-position // alignment) * alignment


def read_exactly(file: BinaryIO, length: int, path: Path) -> bytes:
    """Read exactly `length` bytes. FormatError: the file ends early."""
    content = file.read(length)
    if len(content) < length:
        raise FormatError(f"{path.name}: ends at byte {file.tell()}, {length - len(content)} too early")
    return content


def read_number(file: BinaryIO, letter: str, path: Path) -> int:
    """Read a number by struct's format character."""
    return int(struct.unpack(f"<{letter}", read_exactly(file, struct.calcsize(letter), path))[0])


def read_text(file: BinaryIO, path: Path) -> str:
    """Read a string."""
    length = read_number(file, "Q", path)
    if length > TEXT_LIMIT:
        raise FormatError(f"{path.name}: a string of {length} bytes")
    return read_exactly(file, length, path).decode()


def read_value(file: BinaryIO, path: Path) -> str | int | None:
    """Read a metadata value: a string or a uint32; skip all other types and return None."""
    kind = read_number(file, "I", path)
    if kind == STRING:
        return read_text(file, path)
    if kind == ARRAY:
        skip_array(file, path)
        return None
    if kind not in NUMBERS:
        raise FormatError(f"{path.name}: a field of type {kind}")
    content = read_exactly(file, struct.calcsize(NUMBERS[kind]), path)
    return int(struct.unpack("<I", content)[0]) if kind == UINT32 else None


def skip_array(file: BinaryIO, path: Path) -> None:
    """Skip an array of numbers or strings."""
    kind, length = read_number(file, "I", path), read_number(file, "Q", path)
    if kind == STRING and length <= TEXT_LIMIT:
        for _ in range(length):
            read_text(file, path)
    elif kind in NUMBERS and length * struct.calcsize(NUMBERS[kind]) <= path.stat().st_size:
        file.seek(length * struct.calcsize(NUMBERS[kind]), os.SEEK_CUR)
    else:
        raise FormatError(f"{path.name}: an array of {length} values of type {kind}")


def read_info(file: BinaryIO, path: Path) -> Info:
    """Read the next tensor's header. FormatError: not a vector of floating-point numbers."""
    dimensions = read_number(file, "I", path)
    if dimensions != 1:
        raise FormatError(f"{path.name}: a tensor of {dimensions} dimensions")
    width, kind, offset = read_number(file, "Q", path), read_number(file, "I", path), read_number(file, "Q", path)
    if kind not in FLOATS or not 0 < width <= WIDTH_LIMIT:
        raise FormatError(f"{path.name}: a tensor of type {kind} and width {width}")
    return Info(width, FLOATS[kind], offset)


def alignment_of(metadata: Mapping[str, str | int | None], path: Path) -> int:
    """Return the alignment of the data. FormatError: not a power of two."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= TEXT_LIMIT or alignment & (alignment - 1):
        raise FormatError(f"{path.name} general.alignment: {alignment!r}")
    return alignment


def layer_of(name: str, path: Path) -> int:
    """Return L of `direction.L`."""
    stem, _, digits = name.partition(".")
    if stem != "direction" or not (digits.isascii() and digits.isdigit()) or len(digits) > 4:
        raise FormatError(f"{path.name} {name}: not direction.L")
    return int(digits)


def read_data(file: BinaryIO, start: int, info: Info, name: str, path: Path) -> Tensor:
    """Read a direction [d] as float32. FormatError: it has values that are not finite."""
    if start + info.offset > path.stat().st_size:
        raise FormatError(f"{path.name} {name}: extends past the end of the file")
    file.seek(start + info.offset)
    content = bytearray(read_exactly(file, info.width * info.dtype.itemsize, path))
    direction = torch.frombuffer(content, dtype=info.dtype).float()
    if not all_finite(direction):
        raise FormatError(f"{path.name} {name}: has values that are not finite")
    return direction
