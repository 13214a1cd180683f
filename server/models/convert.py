"""Write a GGUF file as a folder that vLLM and Transformers load: bfloat16 safetensors, configuration, tokenizer."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import replacing_folder
from rudder.server.models import llama, tokenizer
from rudder.server.models.gguf_file import GGUFFile, read
from rudder.server.models.llama import Weight

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30
PROGRESS_DELAY_S = 1.0


def convert(path: Path, out: Path) -> None:
    """Write the model of a GGUF file into a new folder. ModelFileError: the file is damaged, or it is no Llama model.
    UserError: `out` is there and not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out: {out} is there and not empty, so it is left as it is")
    file = read(path)
    with replacing_folder(out) as folder:
        write_model(file, folder)


def write_model(file: GGUFFile, folder: Path) -> None:
    """Write all files of a model into a folder; errors name the file as in `convert`."""
    config = llama.config_of(file)
    weights = llama.weights_of(file, config)
    texts = tokenizer.files_of(file, config)
    special = tokenizer.special_ids(file)
    write_json(folder / CONFIG, {**config, **special})
    write_json(folder / "generation_config.json", {**special, "eos_token_id": tokenizer.end_ids(file)})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    write_weights(file, weights, folder)


def write_weights(file: GGUFFile, weights: Mapping[str, Weight], folder: Path) -> None:
    """Write the weights into one file, or into shards with an index."""
    parts = list(shards(weights))
    names = [WEIGHTS] if len(parts) == 1 else [shard_name(number, len(parts)) for number in range(1, len(parts) + 1)]
    with tqdm(
        total=len(weights),
        desc=f"converting {file.name}",
        unit="tensor",
        delay=PROGRESS_DELAY_S,
        leave=False,
        disable=None,
    ) as bar:
        for name, part in zip(names, parts, strict=True):
            tensors = {}
            for key, weight in part.items():
                tensors[key] = llama.read_weight(file, weight)
                bar.update()
            save(folder / name, tensors)
    if len(parts) > 1:
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        total = sum(map(bytes_of, weights.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def shards(weights: Mapping[str, Weight]) -> Iterator[dict[str, Weight]]:
    """Split weights into parts of at most MAX_SHARD_BYTES, or of one weight."""
    part: dict[str, Weight] = {}
    for name, weight in weights.items():
        if part and sum(map(bytes_of, part.values())) + bytes_of(weight) > MAX_SHARD_BYTES:
            yield part
            part = {}
        part[name] = weight
    yield part


def shard_name(number: int, count: int) -> str:
    """Return the name that Transformers gives a shard."""
    stem, _, ending = WEIGHTS.partition(".")
    return f"{stem}-{number:05}-of-{count:05}.{ending}"


def bytes_of(weight: Weight) -> int:
    """Return the size of a weight in bfloat16."""
    size = 2
    for dimension in weight.shape:
        size *= dimension
    return size


def save(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file. OSError: it cannot be written."""
    try:
        save_file(dict(tensors), path, {"format": "pt"})
    except SafetensorError as error:
        # The library reports a full disk in its own words, without the file.
        raise OSError(f"{path}: {error}") from error
    # safetensors creates files that only their owner may read.
    shutil.copymode(path.parent / CONFIG, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
