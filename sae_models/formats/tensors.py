"""Read tensors and settings from untrusted files.

Declared sizes are checked against the size of the file before anything is parsed or allocated. A file with false sizes,
a truncated file and one that expands without bound all raise a FormatError that names it.
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

# An SAE has about ten tensors, so headers, opcodes and settings are a few kilobytes.
HEADER_LIMIT = 1 << 20
SETTINGS_LIMIT = 4 << 20
YAML_LIMIT = 64 << 10
NESTING_LIMIT = 20
# Deflate cannot compress floating-point weights much; a file that expands more is a decompression bomb.
EXPANSION_LIMIT = 16
# Hashing a tuple visits shared members once per reference: nested tuples of the same tuple twice take exponential time.
SHARED_TUPLES_LIMIT = 24
FINITE_BLOCK = 1 << 22

# These functions of numpy are not typed.
npy: Any = np.lib.format

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SIZES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# All that zipfile and numpy's header parser may raise; the header is a Python literal.
BROKEN_ARCHIVE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, SyntaxError, OverflowError, struct.error),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)

# Storage types of a torch file with their item sizes, and all globals that a pickle of plain tensors refers to.
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
    """A tensor's entry in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, memory-mapped."""
    check_safetensors(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path.name}: {error}") from error


def safetensors_header(path: Path) -> tuple[dict[str, Entry], int]:
    """Read the header of a safetensors file; return its entries and the number of bytes after it."""
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
    """Raise FormatError unless every tensor lies within the file, with a known dtype and the size of its shape."""
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
    """Read a torch file, memory-mapped, by weights-only unpickling of tensors, containers and plain values.

    `verify` compares the content with its checksums, which reads the whole file.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            check_torch_archive(archive, path)
            if verify and (broken := archive.testzip()) is not None:
                raise FormatError(f"{path.name} {broken}: is damaged, its checksum differs")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FormatError:
        raise
    except zipfile.BadZipFile as error:
        raise FormatError(f"{path.name}: not a whole torch file of version 1.6 or later: {error}") from error
    # Unpickling runs the file's opcodes on Python objects, so it may raise any exception.
    except Exception as error:
        raise FormatError(f"{path.name}: {error}") from error


def check_torch_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise FormatError unless members are uncompressed and the pickle builds plain tensors from members of their
    declared sizes.
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
    """Return (key, bytes) of each storage that a pickle refers to, from its opcodes, without executing them.

    FormatError: it refers to a global outside PICKLED, to a storage in another way than torch, or to shared tuples
    more than SHARED_TUPLES_LIMIT times.
    """
    memo: dict[Any, Any] = {}
    pushed: list[tuple[str, Any]] = []
    declared, shared = [], 0
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
            declared.append(storage(pushed[-7:], path))
            pushed.append((name, None))
        else:
            pushed.append((name, argument))
    if shared > SHARED_TUPLES_LIMIT:
        raise FormatError(f"{path.name}: refers {shared} times to its tuples")
    return declared


def storage(pushed: list[tuple[str, Any]], path: Path) -> tuple[str, int]:
    """Return (key, bytes) of a storage from torch's seven opcodes for it.

    MARK, "storage", type, key, device, number of values, TUPLE.
    """
    names, values = [name for name, _ in pushed], [value for _, value in pushed]
    itemsize = STORAGES.get(values[2]) if len(values) == 7 else None
    if names[:1] != ["MARK"] or names[-1:] != ["TUPLE"] or itemsize is None:
        raise FormatError(f"{path.name}: refers to a storage as torch does not: {values}")
    _, tag, _, key, _, count, _ = values
    if tag != "storage" or not isinstance(key, str) or not isinstance(count, int):
        raise FormatError(f"{path.name}: refers to a storage as torch does not: {values}")
    return key, count * itemsize


def check_members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of a zip archive. FormatError: names escape it or repeat, or contents expand too much."""
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
    """Read the arrays of an npz file by name."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = check_members(archive, path)
            return {member.filename.removesuffix(".npy"): read_npy(archive, member, path) for member in members}
    except FormatError:
        raise
    except BROKEN_ARCHIVE as error:
        raise FormatError(f"{path.name}: {error}") from error


def read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Tensor:
    """Read an array of an npz file, after comparing its header with the member's size."""
    with archive.open(member) as file:
        shape, dtype = npy_header(cast(BinaryIO, file))
        if dtype.kind not in "fiub" or not dtype.isnative or any(n < 0 for n in shape):
            raise FormatError(f"{path.name} {member.filename}: dtype {dtype}, shape {shape}")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise FormatError(f"{path.name} {member.filename}: {member.file_size} bytes for {dtype} of shape {shape}")
    with archive.open(member) as file:
        return torch.from_numpy(np.ascontiguousarray(npy.read_array(file, allow_pickle=False)).reshape(shape))


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return (shape, dtype) of the npy array that follows; versions 1 and 2 of the format."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, _, dtype = read[npy.read_magic(file)](file)
    return shape, dtype


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(read_text(path, SETTINGS_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path.name}: is not an object")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping without aliases; its values are strings, mappings and lists of them."""
    try:
        text = read_text(path, YAML_LIMIT)
        check_tokens(text, path)
        # BaseLoader converts nothing: PyYAML's conversions of numbers and dates may raise any exception.
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except FormatError:
        raise
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise FormatError(f"{path.name}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FormatError(f"{path.name}: is not a mapping of names")
    return content


def check_tokens(content: str, path: Path) -> None:
    """Raise FormatError for YAML with aliases, which may expand exponentially, or with deep nesting, which is slow."""
    depth = 0
    for token in yaml.scan(content):
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if isinstance(token, yaml.AliasToken) or depth > NESTING_LIMIT:
            raise FormatError(f"{path.name}: has aliases, or is nested {NESTING_LIMIT} deep")


def read_text(path: Path, limit: int) -> str:
    """Read a text file of at most `limit` bytes."""
    if path.stat().st_size > limit:
        raise FormatError(f"{path.name}: {path.stat().st_size} bytes, at most {limit} are read")
    return path.read_text(encoding="utf-8")


def state_dict(content: Any, file: str) -> dict[str, Any]:
    """Return the content of a torch file. FormatError: not a dictionary with strings as keys."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FormatError(f"{file}: holds no dictionary of names")
    return content


def take(tensors: Mapping[str, Any], key: str, file: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return the tensor named `key`. FormatError: missing, not floating-point, not finite, or of another shape.

    -1 in `shape` matches any length but 0.
    """
    tensor = tensors.get(key)
    if tensor is None:
        raise FormatError(f"{file} {key}: missing among {', '.join(sorted(tensors)[:20])}")
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.is_floating_point():
        raise FormatError(f"{file} {key}: is not a tensor of floating-point numbers")
    if 0 in tensor.shape or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{file} {key}: shape {tuple(tensor.shape)}, the file holds less")
    if shape is not None and not has_shape(tensor, shape):
        raise FormatError(f"{file} {key}: shape {tuple(tensor.shape)} instead of {shape}")
    if not all_finite(tensor.detach()):
        raise FormatError(f"{file} {key}: has values that are not finite")
    return tensor.detach()


def has_shape(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has a shape; -1 in it matches any length."""
    return len(shape) == tensor.dim() and all(n in (-1, have) for n, have in zip(shape, tensor.shape, strict=True))


def all_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite.

    Sums blocks first, without a temporary mask: a sum is finite only if all its values are. An infinite sum may also be
    an overflow, so only then the values are tested.
    """
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    blocks = rows.split(max(1, FINITE_BLOCK * len(rows) // rows.numel()))
    return all(bool(block.sum().isfinite()) or bool(block.isfinite().all()) for block in blocks)


def orient(matrix: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """Return a matrix as [rows, columns], transposed if its shape is. FormatError: square, so that both would fit."""
    if tuple(matrix.shape) not in ((rows, columns), (columns, rows)):
        raise FormatError(f"{name}: shape {tuple(matrix.shape)}, neither {(rows, columns)} nor {(columns, rows)}")
    if rows == columns:
        raise FormatError(f"{name}: is square, its orientation is ambiguous")
    return matrix if matrix.shape[0] == rows else matrix.T


def refuse_unknown(tensors: Mapping[str, Any], known: Collection[str], file: str) -> None:
    """Raise FormatError for tensors that a reader does not know, since ignoring them may change the arithmetic."""
    unknown = sorted(key for key, value in tensors.items() if key not in known and isinstance(value, Tensor))
    if unknown:
        raise FormatError(f"{file}: unknown tensors {', '.join(unknown[:20])}")


def assemble(
    encoder: Tensor, bias: Tensor, decoder: Tensor, decoder_bias: Tensor, threshold: Tensor | float = 0.0, **rest: Any
) -> SAE:
    """Return the canonical form of checked weights, encoder [F, d] and decoder [F, d_out], with vectors in float32.

    Negative thresholds become 0: every format applies a ReLU after the threshold.
    """
    limits = threshold.float().clamp(min=0.0) if isinstance(threshold, Tensor) else torch.full_like(bias, threshold)
    return SAE(encoder, bias.float(), limits.float().expand_as(bias).clone(), decoder, decoder_bias.float(), **rest)
