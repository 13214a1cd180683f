"""Where in a transformers model vectors are read or replaced."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from rudder.sae_models import hookpoints as points
from rudder.sae_models.errors import UserError

Edit = Callable[[Tensor], Tensor | None]

# Where in a layer a branch is, the first that the layer has: the norm or scale behind the branch where there is one,
# and in post-norm encoders the projection, because what surrounds it already holds the residual stream.
BRANCHES = {
    "attn_out": ("layer_scale1", "attention.output.dense", "self_attn", "attn", "attention"),
    "mlp_in": ("intermediate", "mlp", "fc1", "feed_forward"),
    "mlp_out": ("layer_scale2", "output.dense", "mlp", "fc2", "feed_forward"),
}
SANDWICH = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


@dataclass(frozen=True)
class Site:
    """`layers.<layer>.<point>`: what the layer is given or returns, the stream between its branches, what its MLP is
    given, what a branch adds.
    """

    layer: int
    point: str

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.point}"


def parse_site(text: str) -> Site:
    """ValueError: the text does not name a site."""
    return Site(*points.parse(text))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a model: its one outermost list of modules, or of several the one with as many as the text part
    of its configuration says. ValueError: none, or no telling which.
    """
    lists, settings = list(_outermost(model)), getattr(model, "config", None)
    if len(lists) > 1 and isinstance(settings, PreTrainedConfig):
        count = getattr(settings.get_text_config(), "num_hidden_layers", None)
        lists = [layers for layers in lists if len(layers) == count]
    if len(lists) != 1:
        raise UserError(f"model: {type(model).__name__} has {len(lists)} lists of layers, need exactly one")
    return lists[0]


def _outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost(child)


def layer_at(model: nn.Module, site: Site) -> nn.Module:
    """The layer of a site. ValueError: the model has no such layer."""
    layers = layers_of(model)
    if site.layer >= len(layers):
        raise UserError(f"site: layer {site.layer} is not in 0..{len(layers) - 1}")
    return layers[site.layer]


def module_at(model: nn.Module, site: Site) -> nn.Module:
    """The module that is given (`resid_pre`, `mlp_in`) or returns (the others) the vectors. ValueError: none does.

    For `resid_mid` it is that of `attn_out`, which returns what is to be added to what the layer was given.
    """
    layer = layer_at(model, site)
    if site.point == "resid_mid":
        if not points.has_middle(layer):
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


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


@contextmanager
def hooked(model: nn.Module, site: Site, edit: Edit) -> Iterator[None]:
    """Within the block, `edit` sees the vectors [batch, length, d] at the site; what it returns replaces them."""
    module = module_at(model, site)
    with ExitStack() as stack:
        if site.point in ("resid_pre", "mlp_in"):
            handle = module.register_forward_pre_hook(_on_input(edit), with_kwargs=True)
        elif site.point == "resid_mid":
            given: list[Tensor] = []
            keep = _on_input(lambda x: given.append(x))
            stack.callback(layer_at(model, site).register_forward_pre_hook(keep, with_kwargs=True).remove)
            handle = module.register_forward_hook(_on_output(lambda added: _displaced(edit, given.pop(), added)))
        else:
            handle = module.register_forward_hook(_on_output(edit))
        stack.callback(handle.remove)
        yield


def _displaced(edit: Edit, given: Tensor, added: Tensor) -> Tensor | None:
    edited = edit(given + added)
    return None if edited is None else edited - given


def _on_input(edit: Edit) -> Callable[..., Any]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        edited = edit(args[0] if args else kwargs["hidden_states"])
        if edited is None:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": edited})

    return before


def _on_output(edit: Edit) -> Callable[..., Any]:
    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        edited = edit(hidden)
        if edited is None:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return after


@contextmanager
def recorded(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Within the block, each forward pass leaves the vectors [batch, length, d] of every site in the mapping."""
    seen: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(hooked(model, site, _keep(seen, site)))
        yield seen


def _keep(seen: dict[Site, Tensor], site: Site) -> Edit:
    def keep(x: Tensor) -> None:
        seen[site] = x

    return keep
