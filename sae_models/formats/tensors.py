"""Reading tensors and settings from files that are not trusted.

What a file declares is checked against the size it has before anything is parsed or allocated by it: a file that lies,
is cut short or expands without measure gives one FormatError that names it.
"""

import json
import math
import pickletools
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rudder.sae_models.formats.source import FormatError
from rudder.sae_models.sae import SAE

# An SAE has some ten tensors: its headers, opcodes and settings are kilobytes.
HEADER_LIMIT = 1 << 20
SETTINGS_LIMIT = 4 << 20
YAML_LIMIT = 64 << 10
NESTING_LIMIT = 20
# Deflate cannot shrink floating-point weights much; what expands more is made to exhaust memory.
EXPANSION_LIMIT = 16
# Hashing a tuple visits what it holds each time it occurs: tuples made of the same tuple twice, over and over, hang.
SHARED_TUPLES_LIMIT = 24
FINITE_BLOCK = 1 << 22

# numpy gives these functions no types.
npy: Any = np.lib.format

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SIZES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# What zipfile and numpy's reader of headers raise beside the errors of their own: the header is a Python literal.
BROKEN_ARCHIVE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, SyntaxError, OverflowError, struct.error),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)

# What a torch file of plain tensors is made of: storages and the sizes of their values, and what is called.
STORAGES = {
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
}
PICKLED = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch Size",
        "torch device",
        *(f"torch {name}" for name in ("float64", "float32", "float16", "bfloat16")),
        *STORAGES,
    }
)


class Entry(msgspec.Struct):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped."""
    check_safetensors(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path.name}: {error}") from error


def safetensors_header(path: Path) -> tuple[dict[str, Entry], int]:
    """What a safetensors file says it holds, from its header alone, and how many bytes it has beside that."""
    try:
        with path.open("rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise FormatError(f"{path.name}: a header of {length} bytes, the file has {size}")
            header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {key: msgspec.json.decode(raw, type=Entry) for key, raw in header.items()}
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as error:
        raise FormatError(f"{path.name}: {error}") from error
    return entries, size - 8 - length


def check_safetensors(path: Path) -> None:
    """FormatError unless every tensor lies in the file with the size of its shape and a known dtype."""
    header, data = safetensors_header(path)
    for key, entry in header.items():
        begin, end = entry.data_offsets
        if entry.dtype not in SIZES:
            raise FormatError(f"{path.name} {key}: dtype {entry.dtype}, not one of {', '.join(SIZES)}")
        if any(n < 0 for n in entry.shape) or not 0 <= begin <= end <= data:
            raise FormatError(f"{path.name} {key}: bytes {begin} to {end} of {data}, shape {entry.shape}")
        if math.prod(entry.shape) * SIZES[entry.dtype] != end - begin:
            raise FormatError(f"{path.name} {key}: {end - begin} bytes for {entry.dtype} of shape {entry.shape}")


def read_pickle(path: Path, verify: bool = True) -> Any:
    """What a torch file holds, memory-mapped, by weights-only unpickling of tensors, containers and plain values.

    `verify` compares the content with its checksums, which reads all of it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            check_torch_archive(archive, path)
            if verify and (broken := archive.testzip()) is not None:
                raise FormatError(f"{path.name} {broken}: is not what was written, its checksum differs")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FormatError:
        raise
    except zipfile.BadZipFile as error:
        raise FormatError(f"{path.name}: not a whole torch file of version 1.6 or later: {error}") from error
    # Unpickling runs the file's opcodes on Python objects, so it may end in any error that Python has.
    except Exception as error:
        raise FormatError(f"{path.name}: {error}") from error


def check_torch_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """FormatError unless members are stored as they are within the file, and the pickle makes plain tensors alone out
    of members that are as large as it says.
    """
    members = check_members(archive, path)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FormatError(f"{path.name}: has compressed members, torch writes none")
    pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or pickles[0].file_size > HEADER_LIMIT:
        raise FormatError(f"{path.name}: needs one data.pkl of at most {HEADER_LIMIT} bytes")
    sizes = {member.filename: member.file_size for member in members}
    home = pickles[0].filename.removesuffix("data.pkl")
    for key, size in storages(archive.read(pickles[0]), path):
        if sizes.get(f"{home}data/{key}") != size:
            raise FormatError(f"{path.name} data/{key}: {sizes.get(f'{home}data/{key}')} bytes, {size} are declared")


def storages(pickled: bytes, path: Path) -> list[tuple[str, int]]:
    """(key, bytes) of each storage that a pickle refers to, from its opcodes alone.

    FormatError where it calls anything but PICKLED, refers to a storage otherwise than torch does, or shares tuples
    beyond measure.
    """
    memo: dict[Any, Any] = {}
    pushed: list[tuple[str, Any]] = []
    found, shared = [], 0
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "GLOBAL" and argument not in PICKLED:
            raise FormatError(f"{path.name}: refers to {argument}, which a file of tensors does not")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = pushed[-1] if pushed else ("", None)
        elif name in ("BINGET", "LONG_BINGET"):
            pushed.append(memo.get(argument, ("", None)))
            shared += pushed[-1][0].startswith("TUPLE")
        elif name == "BINPERSID":
            found.append(storage(pushed[-7:], path))
            pushed.append((name, None))
        else:
            pushed.append((name, argument))
    if shared > SHARED_TUPLES_LIMIT:
        raise FormatError(f"{path.name}: refers {shared} times to its tuples")
    return found


def storage(pushed: list[tuple[str, Any]], path: Path) -> tuple[str, int]:
    """(key, bytes) of what torch pushes for a storage: MARK, "storage", type, key, place, number of values, TUPLE."""
    names, values = [name for name, _ in pushed], [value for _, value in pushed]
    itemsize = STORAGES.get(values[2]) if len(values) == 7 else None
    torch_like = names[:1] == ["MARK"] and names[-1:] == ["TUPLE"] and itemsize is not None
    if not torch_like or values[1] != "storage" or not isinstance(values[3], str) or not isinstance(values[5], int):
        raise FormatError(f"{path.name}: refers to a storage as torch does not: {values}")
    return values[3], values[5] * cast(int, itemsize)


def check_members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The members of a zip archive; FormatError where names leave it, repeat, or contents expand beyond measure."""
    members = archive.infolist()
    names = [member.filename for member in members]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise FormatError(f"{path.name}: a member is named {name!r}")
    if len(set(names)) < len(names):
        raise FormatError(f"{path.name}: two members have one name")
    declared, size = sum(member.file_size for member in members), path.stat().st_size
    if declared > EXPANSION_LIMIT * size:
        raise FormatError(f"{path.name}: {size} bytes that expand to {declared}")
    return members


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file, by their names."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = check_members(archive, path)
            return {member.filename.removesuffix(".npy"): read_npy(archive, member, path) for member in members}
    except FormatError:
        raise
    except BROKEN_ARCHIVE as error:
        raise FormatError(f"{path.name}: {error}") from error


def read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Tensor:
    """One array of an npz file, once its header agrees with the size it declares."""
    with archive.open(member) as file:
        shape, dtype = npy_header(cast(BinaryIO, file))
        if dtype.kind not in "fiub" or not dtype.isnative or any(n < 0 for n in shape):
            raise FormatError(f"{path.name} {member.filename}: dtype {dtype}, shape {shape}")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise FormatError(f"{path.name} {member.filename}: {member.file_size} bytes for {dtype} of shape {shape}")
    with archive.open(member) as file:
        return torch.from_numpy(np.ascontiguousarray(npy.read_array(file, allow_pickle=False)).reshape(shape))


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of the npy array whose first byte is next; versions 1 and 2 of the format."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, _, dtype = read[npy.read_magic(file)](file)
    return shape, dtype


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text(path, SETTINGS_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path.name}: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path.name}: is not an object")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, without aliases; its values are words, mappings and lists of them."""
    try:
        content = text(path, YAML_LIMIT)
        check_tokens(content, path)
        # It converts no word: PyYAML's conversions of numbers and dates end in any error that Python has.
        found = yaml.load(content, Loader=yaml.BaseLoader)
    except FormatError:
        raise
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise FormatError(f"{path.name}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{path.name}: is not a mapping of names")
    return found


def check_tokens(content: str, path: Path) -> None:
    """FormatError of YAML with aliases, which merged grow without measure, or nested so deeply that it takes long."""
    depth = 0
    for token in yaml.scan(content):
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if isinstance(token, yaml.AliasToken) or depth > NESTING_LIMIT:
            raise FormatError(f"{path.name}: has aliases, or is nested {NESTING_LIMIT} deep")


def text(path: Path, limit: int) -> str:
    """The content of a text file of at most `limit` bytes."""
    if path.stat().st_size > limit:
        raise FormatError(f"{path.name}: {path.stat().st_size} bytes, at most {limit} are read")
    return path.read_text(encoding="utf-8")


def state(found: Any, file: str) -> dict[str, Any]:
    """What a torch file holds, where that is a dictionary with names as keys."""
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{file}: holds no dictionary of names")
    return found


def take(tensors: Mapping[str, Any], key: str, file: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor named `key`, finite and floating; -1 in `shape` stands for any length but 0."""
    tensor = tensors.get(key)
    if tensor is None:
        raise FormatError(f"{file} {key}: missing among {', '.join(sorted(tensors)[:20])}")
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.is_floating_point():
        raise FormatError(f"{file} {key}: is not a tensor of floating-point numbers")
    if 0 in tensor.shape or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{file} {key}: shape {tuple(tensor.shape)}, the file holds less")
    if shape is not None and not fits(tensor, shape):
        raise FormatError(f"{file} {key}: shape {tuple(tensor.shape)} instead of {shape}")
    if not finite(tensor.detach()):
        raise FormatError(f"{file} {key}: has values that are not finite")
    return tensor.detach()


def fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has a shape, -1 in it standing for any length."""
    return len(shape) == tensor.dim() and all(n in (-1, have) for n, have in zip(shape, tensor.shape, strict=True))


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite, a block at a time: a block's sum is finite only if its values are."""
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    blocks = rows.split(max(1, FINITE_BLOCK * len(rows) // rows.numel()))
    return all(bool(block.sum().isfinite()) or bool(block.isfinite().all()) for block in blocks)


def oriented(matrix: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """A matrix as [rows, columns], from its shape; FormatError where it is square, so that either way would fit."""
    if tuple(matrix.shape) not in ((rows, columns), (columns, rows)):
        raise FormatError(f"{name}: shape {tuple(matrix.shape)}, neither {(rows, columns)} nor {(columns, rows)}")
    if rows == columns:
        raise FormatError(f"{name}: is square, which way it is stored cannot be told")
    return matrix if matrix.shape[0] == rows else matrix.T


def only(tensors: Mapping[str, Any], known: Collection[str], file: str) -> None:
    """FormatError that names the tensors beside the known ones: what a reader does not know, it must not ignore."""
    unknown = sorted(key for key, value in tensors.items() if key not in known and isinstance(value, Tensor))
    if unknown:
        raise FormatError(f"{file}: unknown tensors {', '.join(unknown[:20])}")


def assembled(
    encoder: Tensor, bias: Tensor, decoder: Tensor, decoder_bias: Tensor, threshold: Tensor | float = 0.0, **rest: Any
) -> SAE:
    """The canonical form of checked weights, encoder [F, d] and decoder [F, d_out].

    Vectors become float32. A negative threshold is 0 there: every format takes the ReLU of what passes the threshold.
    """
    limits = threshold.float().clamp(min=0.0) if isinstance(threshold, Tensor) else torch.full_like(bias, threshold)
    return SAE(encoder, bias.float(), limits.float().expand_as(bias).clone(), decoder, decoder_bias.float(), **rest)
