"""Run a transformers model over text and yield its activations at chosen sites, batch by batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.hooks import Site, branch_at, captured, layer_at, layers_of
from rudder.sae_models.errors import UserError

WINDOWS_PER_PASS = 32
CPU = torch.device("cpu")


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint. Raise ValueError if it is missing or damaged."""
    return _from_pretrained(AutoTokenizer, folder, "tokenizer")


def load_image_processor(folder: Path) -> Any:
    """Load the image processor of a vision checkpoint. Raise ValueError if it is missing or damaged."""
    return _from_pretrained(AutoImageProcessor, folder, "image processor")


def _from_pretrained(kind: Any, folder: Path, part: str, **settings: Any) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"model: {folder} is not a folder")
    try:
        return kind.from_pretrained(folder, **settings)
    # transformers documents no exception type for damaged files: parsers of several libraries raise their own.
    except Exception as error:
        raise UserError(f"model: {folder}: {part}: {str(error).strip().partition(chr(10))[0]}") from error


def load_model(folder: Path, device: torch.device = CPU) -> Any:
    """Load a checkpoint in float32: a causal LM with its head, the encoder of an encoder-decoder, the bare model
    otherwise. Raise FileNotFoundError if the folder is not a checkpoint, ValueError if it is damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: no config.json in {folder}")
    config = _from_pretrained(AutoConfig, folder, "config.json")
    kind = AutoModelForCausalLM if is_causal_lm(config) else AutoModel
    model = _from_pretrained(kind, folder, "weights", dtype=torch.float32).eval().to(device)
    # Every forward pass covers whole windows, so a KV cache would only cost memory.
    model.config.get_text_config().use_cache = False
    return model.get_encoder() if config.is_encoder_decoder else model


def is_causal_lm(config: Any) -> bool:
    """Return whether a model configuration describes a causal language model."""
    return any("CausalLM" in name or name == "GPT2LMHeadModel" for name in config.architectures or ())


def load_trunk(folder: Path, *sites: Site, device: torch.device = CPU) -> Any:
    """Load a checkpoint's model without the layers above the deepest site. Raise ValueError if it lacks a site."""
    model = load_model(folder, device)
    for site in sites:
        layer_at(model, site)
    depth = 1 + max(site.layer for site in sites)
    del layers_of(model)[depth:]
    model.config.get_text_config().num_hidden_layers = depth
    for site in sites:
        branch_at(model, site)
    return model


@torch.no_grad()
def activations(trunk: Any, sites: Sequence[Site], batches: Iterable[Mapping[str, Tensor]]) -> Iterator[list[Tensor]]:
    """Yield, for each batch, the vectors [batch, length, d] at each site. A batch is the keyword arguments of one
    forward pass.
    """
    with captured(trunk, sites) as vectors:
        for inputs in batches:
            trunk.base_model(**{name: value.to(trunk.device) for name, value in inputs.items()})
            # Some layers flatten batch and length before their MLP.
            batch = len(next(iter(inputs.values())))
            yield [(x := vectors.pop(site)).view(batch, -1, x.shape[-1]) for site in sites]


def text_inputs(trunk: Any, windows: Windows) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the inputs of one forward pass and the mask of counted positions [windows, length]."""
    causal = is_causal_lm(trunk.config)
    for start in range(0, len(windows), WINDOWS_PER_PASS):
        batch = windows.take(torch.arange(start, min(start + WINDOWS_PER_PASS, len(windows))))
        inputs = {"input_ids": batch.tokens}
        if not causal:
            # Padding is on the right: in a causal model no counted position attends to it.
            inputs["attention_mask"] = batch.attention_mask.long()
        yield inputs, batch.counted


def text_activations(trunk: Any, sites: Sequence[Site], windows: Windows) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield, for each batch, the vectors [windows, length, d] at each site, and the mask of counted positions [windows,
    length], which excludes BOS and padding.
    """
    batches = activations(trunk, sites, (inputs for inputs, _ in text_inputs(trunk, windows)))
    for vectors, (_, counted) in zip(batches, text_inputs(trunk, windows), strict=True):
        yield vectors, counted.to(trunk.device)


def residuals(trunk: Any, site: Site, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `text_activations` of a single site."""
    for (x,), counted in text_activations(trunk, [site], windows):
        yield x, counted
