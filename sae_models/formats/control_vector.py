"""Control vectors of repeng and llama.cpp: a GGUF file of architecture `controlvector`, tensors `direction.{L}` [d].

Both add direction L to the output of block L, counted from 0: it belongs to `layers.{L}.resid_post`. repeng also finds
it there. llama.cpp's own generator finds it at the output of block L - 1, and llama.cpp refuses a file with block 0.
The container: little-endian, version 2 or 3 of GGUF.
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
from rudder.sae_models.formats.tensors import finite

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ARCHITECTURE = "controlvector"
# Far above what a model has layers, and what a vector's file says beside them.
TENSORS_LIMIT = 4096
FIELDS_LIMIT = 1024
TEXT_LIMIT = 1 << 16
WIDTH_LIMIT = 1 << 20

UINT32, STRING, ARRAY = 4, 8, 9
# GGUF's number -> struct's letter, of its numeric types.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = {0: torch.float32, 1: torch.float16}


class Info(NamedTuple):
    """Where a tensor of width d and dtype lies, from the start of the data."""

    width: int
    dtype: torch.dtype
    offset: int


def read(path: Path) -> dict[int, Tensor]:
    """Directions [d] by layer, float32. FormatError: no control vector, or one that does not hold what it declares."""
    try:
        with path.open("rb") as file:
            return directions(file, path)
    except (OSError, UnicodeDecodeError, struct.error) as error:
        raise FormatError(f"{path.name}: {error}") from error


def directions(file: BinaryIO, path: Path) -> dict[int, Tensor]:
    """The directions of an open file."""
    magic, version = exactly(file, 4, path), number(file, "I", path)
    if magic != MAGIC or version not in (2, VERSION):
        raise FormatError(f"{path.name}: starts with {magic!r} and version {version}, not GGUF of version 2 or 3")
    tensors, fields = number(file, "Q", path), number(file, "Q", path)
    if tensors > TENSORS_LIMIT or fields > FIELDS_LIMIT:
        raise FormatError(f"{path.name}: {tensors} tensors and {fields} fields")
    said = {text(file, path): value(file, path) for _ in range(fields)}
    if said.get("general.architecture") != ARCHITECTURE:
        raise FormatError(f"{path.name}: architecture {said.get('general.architecture')!r}, not {ARCHITECTURE}")
    infos = [(text(file, path), info(file, path)) for _ in range(tensors)]
    start = aligned(file.tell(), alignment(said, path))
    found = {layer(name, path): data(file, start, where, name, path) for name, where in infos}
    if not found or len(found) < len(infos) or len({len(direction) for direction in found.values()}) > 1:
        widths = sorted({where.width for _, where in infos})
        raise FormatError(f"{path.name}: {len(infos)} directions of {len(found)} layers, of widths {widths}")
    return found


def write(path: Path, vectors: Mapping[int, Tensor], model: str) -> None:
    """Writes directions [d] by layer for a model (its type, such as `llama`); moved to `path` once it can be read."""
    names = {f"direction.{layer}": vector.detach().float().contiguous() for layer, vector in sorted(vectors.items())}
    header = MAGIC + struct.pack("<IQQ", VERSION, len(names), 3)
    for key, content in (("general.architecture", ARCHITECTURE), (f"{ARCHITECTURE}.model_hint", model)):
        header += packed(key) + struct.pack("<I", STRING) + packed(content)
    header += packed(f"{ARCHITECTURE}.layer_count") + struct.pack("<II", UINT32, len(names))
    body = b""
    for name, vector in names.items():
        header += packed(name) + struct.pack("<IQIQ", 1, len(vector), 0, len(body))
        body += filled(vector.numpy().astype("<f4").tobytes())
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        file.write_bytes(filled(header) + body)
        read(file)
        file.replace(path)


def packed(content: str) -> bytes:
    """A GGUF string: its length in bytes, and these."""
    encoded = content.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def filled(content: bytes) -> bytes:
    """Content up to the next aligned position."""
    return content + bytes(aligned(len(content), ALIGNMENT) - len(content))


def aligned(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def exactly(file: BinaryIO, length: int, path: Path) -> bytes:
    """The next bytes; FormatError where the file ends before."""
    content = file.read(length)
    if len(content) < length:
        raise FormatError(f"{path.name}: ends at byte {file.tell()}, {length - len(content)} too early")
    return content


def number(file: BinaryIO, letter: str, path: Path) -> int:
    """The next number, by struct's letter."""
    return int(struct.unpack(f"<{letter}", exactly(file, struct.calcsize(letter), path))[0])


def text(file: BinaryIO, path: Path) -> str:
    """The next string."""
    length = number(file, "Q", path)
    if length > TEXT_LIMIT:
        raise FormatError(f"{path.name}: a string of {length} bytes")
    return exactly(file, length, path).decode()


def value(file: BinaryIO, path: Path) -> str | int | None:
    """The next field's value: a string or a whole number; None for what is passed over."""
    kind = number(file, "I", path)
    if kind == STRING:
        return text(file, path)
    if kind == ARRAY:
        pass_over(file, path)
        return None
    if kind not in NUMBERS:
        raise FormatError(f"{path.name}: a field of type {kind}")
    content = exactly(file, struct.calcsize(NUMBERS[kind]), path)
    return int(struct.unpack("<I", content)[0]) if kind == UINT32 else None


def pass_over(file: BinaryIO, path: Path) -> None:
    """Moves behind an array of numbers or strings."""
    kind, length = number(file, "I", path), number(file, "Q", path)
    if kind == STRING and length <= TEXT_LIMIT:
        for _ in range(length):
            text(file, path)
    elif kind in NUMBERS and length * struct.calcsize(NUMBERS[kind]) <= path.stat().st_size:
        file.seek(length * struct.calcsize(NUMBERS[kind]), os.SEEK_CUR)
    else:
        raise FormatError(f"{path.name}: an array of {length} values of type {kind}")


def info(file: BinaryIO, path: Path) -> Info:
    """The next tensor's place; FormatError unless it is a vector of floating-point numbers."""
    dimensions = number(file, "I", path)
    if dimensions != 1:
        raise FormatError(f"{path.name}: a tensor of {dimensions} dimensions")
    width, kind, offset = number(file, "Q", path), number(file, "I", path), number(file, "Q", path)
    if kind not in FLOATS or not 0 < width <= WIDTH_LIMIT:
        raise FormatError(f"{path.name}: a tensor of type {kind} and width {width}")
    return Info(width, FLOATS[kind], offset)


def alignment(said: Mapping[str, str | int | None], path: Path) -> int:
    """The alignment of the data."""
    found = said.get("general.alignment", ALIGNMENT)
    if not isinstance(found, int) or not 0 < found <= TEXT_LIMIT or found & (found - 1):
        raise FormatError(f"{path.name} general.alignment: {found!r}")
    return found


def layer(name: str, path: Path) -> int:
    """L of `direction.L`."""
    stem, _, digits = name.partition(".")
    if stem != "direction" or not (digits.isascii() and digits.isdigit()) or len(digits) > 4:
        raise FormatError(f"{path.name} {name}: not direction.L")
    return int(digits)


def data(file: BinaryIO, start: int, where: Info, name: str, path: Path) -> Tensor:
    """A direction [d], finite and in float32."""
    if start + where.offset > path.stat().st_size:
        raise FormatError(f"{path.name} {name}: lies behind the end of the file")
    file.seek(start + where.offset)
    content = bytearray(exactly(file, where.width * where.dtype.itemsize, path))
    direction = torch.frombuffer(content, dtype=where.dtype).float()
    if not finite(direction):
        raise FormatError(f"{path.name} {name}: has values that are not finite")
    return direction
