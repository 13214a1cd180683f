"""Where in a transformers model the residual stream is read or replaced."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor | None]
LAYER_PATHS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
)


@dataclass(frozen=True)
class Site:
    """`layers.<layer>.resid_post` or `layers.<layer>.resid_pre`."""

    layer: int
    point: str


def parse_site(text: str) -> Site:
    """ValueError: the text does not name a site."""
    match = re.fullmatch(r"layers\.(\d+)\.(resid_post|resid_pre)", text)
    if not match:
        raise ValueError(f"site: {text!r} is not layers.<L>.resid_post or layers.<L>.resid_pre")
    return Site(int(match[1]), match[2])


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM. ValueError: no known layout."""
    for path in LAYER_PATHS:
        layers = _attribute(model, path)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(f"model: {type(model).__name__} has decoder layers at none of {', '.join(LAYER_PATHS)}")


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def layer_at(model: nn.Module, site: Site) -> nn.Module:
    """The layer of a site. ValueError: the model has no such layer."""
    layers = layers_of(model)
    if site.layer >= len(layers):
        raise ValueError(f"site: layer {site.layer} is not in 0..{len(layers) - 1}")
    return layers[site.layer]


@contextmanager
def hooked(model: nn.Module, site: Site, edit: Edit) -> Iterator[None]:
    """Within the block, `edit` sees the residual stream [batch, length, d] at the site; what it returns replaces it."""
    layer = layer_at(model, site)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        edited = edit(args[0])
        return None if edited is None else (edited, *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        edited = edit(hidden)
        if edited is None:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = (
        layer.register_forward_pre_hook(before) if site.point == "resid_pre" else layer.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()
