"""Run a transformers model over text and yield its activations at chosen sites, batch by batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from rudder.sae_models.activations import norms
from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.hooks import Site, branch_at, captured, layer_at, layers_of
from rudder.sae_models.errors import UserError

# A chunk, and a forward pass, hold as many tokens as this many windows without padding.
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
    kind = AutoModelForImageTextToText if is_multimodal_lm(config) else AutoModelForCausalLM
    kind = kind if is_causal_lm(config) else AutoModel
    model = _from_pretrained(kind, folder, "weights", dtype=torch.float32).eval().to(device)
    # Every forward pass covers whole windows, so a KV cache would only cost memory.
    model.config.get_text_config().use_cache = False
    return model.get_encoder() if config.is_encoder_decoder else model


def is_causal_lm(config: Any) -> bool:
    """Return whether a model configuration describes a causal language model, one that also reads images included."""
    names = config.architectures or ()
    return is_multimodal_lm(config) or any("CausalLM" in name or name == "GPT2LMHeadModel" for name in names)


def is_multimodal_lm(config: Any) -> bool:
    """Return whether a configuration describes a decoder of text that also reads images, such as Gemma 3 4b."""
    text, names = config.get_text_config(), config.architectures or ()
    generates = any(name.endswith("ForConditionalGeneration") for name in names)
    return generates and text is not config and not config.is_encoder_decoder and not text.is_encoder_decoder


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


def window_inputs(trunk: Any, windows: Windows) -> dict[str, Tensor]:
    """Return the inputs of one forward pass."""
    if is_causal_lm(trunk.config):
        # Padding is on the right: in a causal model no counted position attends to it.
        return {"input_ids": windows.tokens}
    return {"input_ids": windows.tokens, "attention_mask": windows.attention_mask.long()}


def chunk_activations(trunk: Any, sites: Sequence[Site], chunk: Windows) -> list[Tensor]:
    """Return the vectors [windows, length, d] at each site of one chunk of windows, zero at padding.

    Windows of similar size go through the model together, without the padding that the chunk has.
    """
    passes = chunk.passes(WINDOWS_PER_PASS)
    batches = (window_inputs(trunk, chunk.take(index).trimmed()) for index in passes)
    results: list[Tensor] = []
    for index, vectors in zip(passes, activations(trunk, sites, batches), strict=True):
        if not results:
            results = [x.new_zeros(*chunk.tokens.shape, x.shape[-1]) for x in vectors]
        for result, x in zip(results, vectors, strict=True):
            result[index.to(x.device), : x.shape[1]] = x
    return results


def text_activations(trunk: Any, sites: Sequence[Site], windows: Windows) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield, chunk by chunk in the order of the windows, the vectors [windows, length, d] at each site, and the mask of
    counted positions [windows, length], which excludes BOS, padding, what the windows' rule excludes, and attention
    sinks (`norms`).
    """
    for index in windows.chunks(WINDOWS_PER_PASS):
        chunk = windows.take(index).trimmed()
        vectors, counted = chunk_activations(trunk, sites, chunk), chunk.counted.to(trunk.device)
        counted[counted.clone()] = norms.within_limit([x[counted] for x in vectors])
        yield vectors, counted


def residuals(trunk: Any, site: Site, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `text_activations` of a single site."""
    for (x,), counted in text_activations(trunk, [site], windows):
        yield x, counted
