"""Forward hooks that read or replace activations of a transformers model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rudder.sae_models import hookpoints
from rudder.sae_models.activations.layers import Reading
from rudder.sae_models.activations.measure import measure
from rudder.sae_models.errors import UserError

Edit = Callable[[Tensor], Tensor | None]

# Candidate module paths of each branch inside a layer; the first that exists is hooked. The norm or scale after the
# branch comes first. In post-norm encoders it is the projection: the enclosing module already adds the residual.
BRANCHES = {
    "attn_out": ("layer_scale1", "attention.output.dense", "self_attn", "attn", "attention"),
    "mlp_in": ("intermediate", "mlp", "fc1", "feed_forward"),
    "mlp_out": ("layer_scale2", "output.dense", "mlp", "fc2", "feed_forward"),
}
PROBE_TOKENS = 16
_measuring = ContextVar("measuring", default=False)
_readings: WeakKeyDictionary[nn.Module, Reading] = WeakKeyDictionary()
SANDWICH = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


@dataclass(frozen=True)
class Site:
    """`layers.<layer>.<point>`: input or output of a layer (resid_pre, resid_post), residual stream between its
    branches (resid_mid), input of its MLP (mlp_in), or output of a branch (attn_out, mlp_out).
    """

    layer: int
    point: str

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.point}"


def parse_site(text: str) -> Site:
    """Parse a site name. Raise ValueError if the text is not one."""
    return Site(*hookpoints.parse(text))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a model: its only outermost ModuleList or, if there are several, the one of its text
    model, and of this the one whose length is `num_hidden_layers`. Raise ValueError if there is no such list or more
    than one.
    """
    lists, settings = list(_outermost(model)), getattr(model, "config", None)
    if len(lists) > 1 and isinstance(settings, PreTrainedConfig):
        # Vision and text models may have the same depth: only the configurations of the enclosing models differ.
        lists = list(_outermost(text_model_of(model)))
        count = getattr(settings.get_text_config(), "num_hidden_layers", None)
        lists = [layers for layers in lists if len(layers) == count]
    if len(lists) != 1:
        raise UserError(f"model: {type(model).__name__} has {len(lists)} lists of layers, need exactly one")
    return lists[0]


def text_model_of(model: nn.Module) -> nn.Module:
    """Return the outermost part of a model whose configuration is that of the text; the model itself if none is."""
    settings = getattr(model, "config", None)
    text = settings.get_text_config() if isinstance(settings, PreTrainedConfig) else settings
    if text is settings:
        return model
    parts = (part for part in model.modules() if type(getattr(part, "config", None)) is type(text))
    return next(parts, model)


def _outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost(child)


def layer_at(model: nn.Module, site: Site) -> nn.Module:
    """Return the layer of a site. Raise ValueError if the model has no such layer."""
    layers = layers_of(model)
    if site.layer >= len(layers):
        raise UserError(f"site: layer {site.layer} is not in 0..{len(layers) - 1}")
    return layers[site.layer]


def module_at(model: nn.Module, site: Site) -> nn.Module:
    """Return the module whose input (`resid_pre`, `mlp_in`) or output (other points) is the site's vectors. Raise
    ValueError if there is none.

    For `resid_mid` this is the module of `attn_out`: its output plus the layer's input is the residual stream between
    the branches.
    """
    layer = layer_at(model, site)
    if site.point == "resid_mid":
        if not hookpoints.has_resid_mid(layer):
            raise UserError(f"site: {site}: the branches of {type(layer).__name__} do not follow one another")
        return module_at(model, Site(site.layer, "attn_out"))
    if site.point not in BRANCHES:
        return layer
    sandwich = all(hasattr(layer, norm) for norm in ("pre_feedforward_layernorm", *SANDWICH.values()))
    names = (SANDWICH[site.point],) if sandwich and site.point in SANDWICH else BRANCHES[site.point]
    for name in names:
        module = _attribute(layer, name)
        if isinstance(module, nn.Module):
            return module
    raise UserError(f"site: {site}: {type(layer).__name__} has none of {', '.join(names)}")


def branch_at(model: nn.Module, site: Site) -> tuple[nn.Module, float]:
    """Return `module_at` and the factor by which its output is multiplied before it is added to the residual stream.

    In a causal language model both are measured, as serving does. Raise ValueError if the site is not as its name says.
    """
    if site.point in ("resid_pre", "resid_post") or not is_decoder(model):
        return module_at(model, site), 1.0
    layer = layer_at(model, site)
    if layer not in _readings:
        _readings.update(measured_readings(model))
    reading = _readings[layer]
    reading.check(str(site), site.point)
    if site.point == "mlp_in":
        return layer.get_submodule(reading.mlp_input or ""), 1.0
    branch = reading.branch(site.point)
    return layer.get_submodule(branch.path), branch.factor


def is_decoder(model: nn.Module) -> bool:
    """Return whether a model is a causal language model."""
    return "CausalLM" in type(model).__name__ or type(model).__name__.endswith("LMHeadModel")


def measured_readings(model: Any) -> dict[nn.Module, Reading]:
    """Measure all layers of a causal language model. Hooks of this module do nothing meanwhile."""
    layers, settings = layers_of(model), model.config.get_text_config()
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % settings.vocab_size

    def run() -> None:
        model.base_model(input_ids=ids, use_cache=False)

    reset = _measuring.set(True)
    try:
        readings = measure(layers, range(len(layers)), PROBE_TOKENS, settings.hidden_size, run)
    finally:
        _measuring.reset(reset)
    return {layers[number]: reading for number, reading in readings.items()}


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


@contextmanager
def hooked(model: nn.Module, site: Site, edit: Edit) -> Iterator[None]:
    """Within the block, call `edit` with the vectors [batch, length, d] at the site; a tensor that it returns replaces
    them.
    """
    module, factor = branch_at(model, site)
    with ExitStack() as stack:
        if site.point in ("resid_pre", "mlp_in"):
            handle = module.register_forward_pre_hook(_on_input(edit), with_kwargs=True)
        elif site.point == "resid_mid":
            layer_input: list[Tensor] = []
            remember = _on_input(lambda x: layer_input.append(x))
            stack.callback(layer_at(model, site).register_forward_pre_hook(remember, with_kwargs=True).remove)
            handle = module.register_forward_hook(
                _on_output(_scaled(lambda added: _edit_residual_mid(edit, layer_input.pop(), added), factor))
            )
        else:
            handle = module.register_forward_hook(_on_output(_scaled(edit, factor)))
        stack.callback(handle.remove)
        yield


def _edit_residual_mid(edit: Edit, layer_input: Tensor, branch_output: Tensor) -> Tensor | None:
    """Apply `edit` to layer_input + branch_output and return the branch output that yields the edited sum. resid_mid is
    not the output of any module, so the edit is folded into the branch.
    """
    edited = edit(layer_input + branch_output)
    return None if edited is None else edited - layer_input


def _scaled(edit: Edit, factor: float) -> Edit:
    """Make an edit of a branch's output from an edit of what the layer adds to the stream, `factor` times as much."""
    if factor == 1.0:
        return edit

    def scaled(output: Tensor) -> Tensor | None:
        edited = edit(output * factor)
        return None if edited is None else edited / factor

    return scaled


def _on_input(edit: Edit) -> Callable[..., Any]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        edited = None if _measuring.get() else edit(args[0] if args else kwargs["hidden_states"])
        if edited is None:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": edited})

    return before


def _on_output(edit: Edit) -> Callable[..., Any]:
    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        edited = None if _measuring.get() else edit(hidden)
        if edited is None:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return after


@contextmanager
def captured(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Within the block, each forward pass stores the vectors [batch, length, d] of every site in the mapping."""
    vectors: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(hooked(model, site, _store(vectors, site)))
        yield vectors


def _store(vectors: dict[Site, Tensor], site: Site) -> Edit:
    def store(x: Tensor) -> None:
        vectors[site] = x

    return store
