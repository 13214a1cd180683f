"""Activations of a transformers model at chosen sites, pass by pass."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.hooks import Site, layers_of, module_at, recorded
from rudder.sae_models.errors import UserError

WINDOWS_A_PASS = 32
CPU = torch.device("cpu")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint. ValueError: there is none, or it is damaged."""
    return _read(AutoTokenizer, folder, "tokenizer")


def load_image_processor(folder: Path) -> Any:
    """What makes a vision model's inputs of images. ValueError: there is none, or it is damaged."""
    return _read(AutoImageProcessor, folder, "image processor")


def _read(kind: Any, folder: Path, what: str, **settings: Any) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"model: {folder} is not a folder")
    try:
        return kind.from_pretrained(folder, **settings)
    # transformers raises whatever its readers meet in a damaged file.
    except Exception as error:
        raise UserError(f"model: {folder}: {what}: {str(error).strip().partition(chr(10))[0]}") from error


def load_model(folder: Path, device: torch.device = CPU) -> Any:
    """A checkpoint in float32: a causal LM with its head, of any other kind the bare model, of an encoder with a
    decoder the encoder. FileNotFoundError: not a checkpoint. ValueError: it is damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: no config.json in {folder}")
    config = _read(AutoConfig, folder, "config.json")
    kind = AutoModelForCausalLM if speaks(config) else AutoModel
    model = _read(kind, folder, "weights", dtype=torch.float32).eval().to(device)
    # Nothing here is read one token at a time.
    model.config.get_text_config().use_cache = False
    return model.get_encoder() if config.is_encoder_decoder else model


def speaks(config: Any) -> bool:
    """Whether a configuration is of a causal language model."""
    return any("CausalLM" in name or name == "GPT2LMHeadModel" for name in config.architectures or ())


def load_trunk(folder: Path, *sites: Site, device: torch.device = CPU) -> Any:
    """A checkpoint's model without the layers above the deepest site. ValueError: the model lacks a site."""
    model = load_model(folder, device)
    for site in sites:
        module_at(model, site)
    depth = 1 + max(site.layer for site in sites)
    del layers_of(model)[depth:]
    model.config.get_text_config().num_hidden_layers = depth
    return model


@torch.no_grad()
def activations(trunk: Any, sites: Sequence[Site], passes: Iterable[Mapping[str, Tensor]]) -> Iterator[list[Tensor]]:
    """Pass by pass the vectors [batch, length, d] at each site; a pass is the keyword arguments of a forward."""
    with recorded(trunk, sites) as seen:
        for inputs in passes:
            trunk.base_model(**{name: value.to(trunk.device) for name, value in inputs.items()})
            # Some layers flatten the batch for their MLP.
            batch = len(next(iter(inputs.values())))
            yield [(x := seen.pop(site)).view(batch, -1, x.shape[-1]) for site in sites]


def text_passes(trunk: Any, windows: Windows) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Windows as the inputs of passes, and what is counted in each [windows, length]."""
    causal = speaks(trunk.config)
    for start in range(0, len(windows), WINDOWS_A_PASS):
        part = windows.take(torch.arange(start, min(start + WINDOWS_A_PASS, len(windows))))
        inputs = {"input_ids": part.tokens}
        if not causal:
            # Padding is at the end, so in a causal model nothing that counts can see it.
            inputs["attention_mask"] = part.attended.long()
        yield inputs, part.counted


def text_activations(trunk: Any, sites: Sequence[Site], windows: Windows) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Pass by pass: at each site [windows, length, d], and counted [windows, length], without BOS and padding."""
    vectors = activations(trunk, sites, (inputs for inputs, _ in text_passes(trunk, windows)))
    for seen, (_, counted) in zip(vectors, text_passes(trunk, windows), strict=True):
        yield seen, counted.to(trunk.device)


def residuals(trunk: Any, site: Site, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """`text_activations` of one site."""
    for (x,), counted in text_activations(trunk, [site], windows):
        yield x, counted
