"""Where a bank meets a model: hook points found by what decoder layers look like, not by model name.

A decoder layer returns (hidden, residual), whose sum is the residual stream, or one tensor that is it. An edit is added
to one half; whatever reads sees the sum.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rudder.sae_models.errors import UserError
from rudder.sae_models.hookpoints import has_middle, parse
from rudder.server.engine.worker.bank import SiteBank

ATTENTION = ("self_attn", "attn", "attention")
MLP = ("mlp", "fc2", "feed_forward")


class UnknownLayout(UserError):
    """The model has no such site, or its layers do not look like decoder layers."""


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The model's decoder layers: its one list of `count` layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise UnknownLayout(f"sites: {type(model).__name__} has {len(lists)} lists of {count} layers, need exactly one")
    return lists[0]


def attach(bank: SiteBank, layers: nn.ModuleList) -> None:
    """Hook `bank` at its site. Raises UnknownLayout rather than leave a site unhooked."""
    number, point = parse(bank.site)
    if number >= len(layers):
        raise UnknownLayout(f"site: {bank.site} of a model with {len(layers)} layers")
    layer = layers[number]
    if point == "resid_pre":
        hook_inputs(layer, bank)
        return
    if point == "mlp_in":
        hook_mlp_input(branch(layer, point, bank.site), bank)
        return
    if point == "resid_mid":
        hook_middle(layer, branch(layer, "attn_out", bank.site), bank)
        return
    module = layer if point == "resid_post" else branch(layer, point, bank.site)
    module.add_module("rudder_" + point, bank)
    module.register_forward_hook(output_hook(bank, fused=point == "resid_post"))


def branch(layer: nn.Module, point: str, site: str) -> nn.Module:
    """The module whose output is what the attention or MLP branch adds to the residual stream.

    On sandwich-norm models (Gemma 2 and 3) that is the norm behind the branch. For mlp_in, the MLP's first module.
    """
    if point == "mlp_in":
        return first_of(layer, ("mlp", "fc1", "feed_forward"), site)
    sandwich = hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, "post_feedforward_layernorm")
    norm = "post_attention_layernorm" if point == "attn_out" else "post_feedforward_layernorm"
    names = (norm,) if sandwich else ATTENTION if point == "attn_out" else MLP
    return first_of(layer, names, site)


def first_of(layer: nn.Module, names: tuple[str, ...], site: str) -> nn.Module:
    """The layer's module with the first of these names that it has."""
    found: list[nn.Module] = [getattr(layer, name) for name in names if hasattr(layer, name)]
    if not found:
        raise UnknownLayout(f"site: {site}: {type(layer).__name__} has none of {', '.join(names)}")
    return found[0]


def output_hook(bank: SiteBank, fused: bool) -> Callable[..., Any]:
    """A forward hook that edits what a module returns."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return steered(bank, output)
        hidden, *rest = output
        if fused and rest and isinstance(rest[0], Tensor) and rest[0].shape == hidden.shape:
            return (steered(bank, hidden, rest[0]), *rest)
        return (steered(bank, hidden), *rest)

    return hook


def hook_inputs(layer: nn.Module, bank: SiteBank) -> None:
    """Edit what a layer is given: `hidden_states`, read together with `residual` where the layer takes one."""
    given = inputs_of(layer, bank.site)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, residual, at = given(args, kwargs)
        edited = steered(bank, hidden, residual)
        if at is None:
            return args, kwargs | {"hidden_states": edited}
        return (*args[:at], edited, *args[at + 1 :]), kwargs

    layer.add_module("rudder_resid_pre", bank)
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def inputs_of(layer: nn.Module, site: str) -> Callable[[Any, Any], tuple[Tensor, Tensor | None, int | None]]:
    """Of a layer's arguments: hidden states, the residual if it takes one, and the former's place, if positional."""
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise UnknownLayout(f"site: {site}: {type(layer).__name__} takes no hidden_states")
    hidden_at = names.index("hidden_states")
    residual_at = names.index("residual") if "residual" in names else len(names)

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None, int | None]:
        residual = (
            kwargs["residual"] if "residual" in kwargs else args[residual_at] if residual_at < len(args) else None
        )
        if "hidden_states" in kwargs:
            return kwargs["hidden_states"], residual, None
        return args[hidden_at], residual, hidden_at

    return given


def hook_middle(layer: nn.Module, attention: nn.Module, bank: SiteBank) -> None:
    """Edit the residual stream behind the attention branch, by what that branch adds to what the layer was given."""
    if not has_middle(layer):
        raise UnknownLayout(f"site: {bank.site}: the branches of {type(layer).__name__} do not follow one another")
    given = inputs_of(layer, bank.site)
    bank.keep_given()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, residual, _ = given(args, kwargs)
        x = hidden.float() if residual is None else hidden.float() + residual.float()
        x = x.reshape(-1, bank.width)
        bank.given[: x.shape[0]].copy_(x)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden, *rest = (output,) if isinstance(output, Tensor) else output
        tokens = hidden.reshape(-1, bank.width).shape[0]
        edited = steered(bank, hidden, bank.given[:tokens].reshape(hidden.shape))
        return edited if isinstance(output, Tensor) else (edited, *rest)

    layer.add_module("rudder_resid_mid", bank)
    layer.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_hook(after)


def hook_mlp_input(module: nn.Module, bank: SiteBank) -> None:
    """Edit the first argument of an MLP."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (steered(bank, args[0]), *args[1:])

    module.add_module("rudder_mlp_in", bank)
    module.register_forward_pre_hook(hook)


def steered(bank: SiteBank, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
    """`hidden` moved by the bank's displacement, added once in fp32 and rounded once."""
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    move: Tensor = bank(x.reshape(-1, bank.width)).reshape(hidden.shape)
    return (hidden.float() + move).to(hidden.dtype)
