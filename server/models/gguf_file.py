"""Read a GGUF file: metadata and tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from rudder.sae_models.errors import UserError

V = TypeVar("V", bool, int, float, str, list[Any])


class ModelFileError(UserError):
    """A model file that cannot be converted; the message begins with the file and the key or tensor at fault."""


class Reader(GGUFReader):
    """GGUFReader that refuses to read beyond the end of the file: numpy would return fewer values."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *arguments: Any, **keywords: Any) -> Any:
        values = super()._get(offset, dtype, count, *arguments, **keywords)
        if len(values) < count:
            raise ValueError(f"ends at byte {len(self.data)}, too early")
        return values


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensors of a GGUF file. Tensors are mapped, not read."""

    name: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    def value(self, key: str, kind: type[V], default: V | None = None) -> V:
        """Return a value of the metadata. ModelFileError: it is missing without a default, or of another type."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelFileError(f"{self.name}: {key} is missing")
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise ModelFileError(f"{self.name}: {key} is {str(value)[:40]!r}, not of type {kind.__name__}")
        return value

    def values(self, key: str, kind: type[V]) -> list[V]:
        """Return an array of the metadata. ModelFileError: it is missing, or has an item of another type."""
        items = self.value(key, list)
        if not all(type(item) is kind for item in items):
            raise ModelFileError(f"{self.name}: {key} has items that are not of type {kind.__name__}")
        return items

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, outermost dimension first. ModelFileError: there is no such tensor."""
        if name not in self.tensors:
            raise ModelFileError(f"{self.name}: the tensor {name} is missing")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, dequantized to float32. ModelFileError: its type is not one that `gguf` dequantizes."""
        stored = self.tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ModelFileError(f"{self.name}: {name} has the type {stored.tensor_type.name}: {error}") from error
        return torch.from_numpy(np.array(values, np.float32)).reshape(self.shape(name))


def read(path: Path) -> GGUFFile:
    """Read metadata and the table of tensors. ModelFileError: not a GGUF file, a damaged one, or one of several."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelFileError(f"{path.name}: is not a GGUF file")
    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # Whatever a damaged file makes the reader stumble over.
    except (ValueError, LookupError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path.name}: cannot be read as GGUF: {error}") from error
    if reader.byte_order != "I":
        raise ModelFileError(f"{path.name}: is in the byte order of another processor")
    if metadata.get("split.count", 1) != 1:
        problem = f"is one of {metadata['split.count']} shards: merge them first with llama-gguf-split --merge"
        raise ModelFileError(f"{path.name}: {problem}")
    return GGUFFile(path.name, metadata, {tensor.name: tensor for tensor in reader.tensors})
