"""Hook a bank into a model. Hook points are located by the structure of decoder layers, not by the model's name.

A decoder layer returns the residual stream as one tensor, or as a pair (hidden, residual) whose sum it is. The bank
reads the sum, and its displacement is added to `hidden`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rudder.sae_models.errors import UserError
from rudder.sae_models.hookpoints import has_resid_mid, parse
from rudder.server.engine.worker.bank import SiteBank

ATTENTION = ("self_attn", "attn", "attention")
MLP = ("mlp", "fc2", "feed_forward")


class UnknownLayout(UserError):
    """The model has no such site, or its layers are not built as decoder layers are known to be."""


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Return the model's decoder layers: its only list of `count` modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise UnknownLayout(f"sites: {type(model).__name__} has {len(lists)} lists of {count} layers, need exactly one")
    return lists[0]


def attach(bank: SiteBank, layers: nn.ModuleList) -> None:
    """Hook `bank` at its site. Raises UnknownLayout where the model has no such site: none is left unhooked."""
    number, point = parse(bank.site)
    if number >= len(layers):
        raise UnknownLayout(f"site: {bank.site} of a model with {len(layers)} layers")
    layer = layers[number]
    if point == "resid_pre":
        hook_layer_input(layer, bank)
        return
    if point == "mlp_in":
        hook_mlp_input(branch(layer, point, bank.site), branch(layer, "mlp_out", bank.site), bank)
        return
    if point == "resid_mid":
        hook_middle(layer, branch(layer, "attn_out", bank.site), bank)
        return
    module = layer if point == "resid_post" else branch(layer, point, bank.site)
    module.add_module("rudder_" + point, bank)
    module.register_forward_hook(output_hook(bank, fused=point == "resid_post"))


def branch(layer: nn.Module, point: str, site: str) -> nn.Module:
    """Return the module whose output the attention or MLP branch adds to the residual stream.

    On sandwich-norm models (Gemma 2 and 3) it is the norm behind the branch. For mlp_in: the module that reads it.
    """
    if point == "mlp_in":
        return first_of(layer, ("mlp", "fc1", "feed_forward"), site)
    sandwich = hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, "post_feedforward_layernorm")
    norm = "post_attention_layernorm" if point == "attn_out" else "post_feedforward_layernorm"
    names = (norm,) if sandwich else ATTENTION if point == "attn_out" else MLP
    return first_of(layer, names, site)


def first_of(layer: nn.Module, names: tuple[str, ...], site: str) -> nn.Module:
    """Return the layer's module of the first name that it has."""
    modules: list[nn.Module] = [getattr(layer, name) for name in names if hasattr(layer, name)]
    if not modules:
        raise UnknownLayout(f"site: {site}: {type(layer).__name__} has none of {', '.join(names)}")
    return modules[0]


def output_hook(bank: SiteBank, fused: bool) -> Callable[..., Any]:
    """Make a forward hook that edits a module's output; `fused`: it may be a pair (hidden, residual)."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return steered(bank, output)
        hidden, *rest = output
        if fused and rest and isinstance(rest[0], Tensor) and rest[0].shape == hidden.shape:
            return (steered(bank, hidden, rest[0]), *rest)
        return (steered(bank, hidden), *rest)

    return hook


def hook_layer_input(layer: nn.Module, bank: SiteBank) -> None:
    """Edit a layer's input: `hidden_states`, read together with `residual` where the layer takes one."""
    layer_input = input_reader(layer, bank.site)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, residual, index = layer_input(args, kwargs)
        edited = steered(bank, hidden, residual)
        if index is None:
            return args, kwargs | {"hidden_states": edited}
        return (*args[:index], edited, *args[index + 1 :]), kwargs

    layer.add_module("rudder_resid_pre", bank)
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def input_reader(layer: nn.Module, site: str) -> Callable[[Any, Any], tuple[Tensor, Tensor | None, int | None]]:
    """Make a function of a layer's (args, kwargs): hidden states, residual or None, and the former's index in args.

    The index is None where hidden states are a keyword argument.
    """
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise UnknownLayout(f"site: {site}: {type(layer).__name__} takes no hidden_states")
    hidden_index = names.index("hidden_states")
    residual_index = names.index("residual") if "residual" in names else len(names)

    def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None, int | None]:
        positional = args[residual_index] if residual_index < len(args) else None
        residual = kwargs.get("residual", positional)
        if "hidden_states" in kwargs:
            return kwargs["hidden_states"], residual, None
        return args[hidden_index], residual, hidden_index

    return layer_input


def hook_middle(layer: nn.Module, attention: nn.Module, bank: SiteBank) -> None:
    """Edit the residual stream behind the attention branch.

    No module returns it there: it is the layer's input plus the output of the attention branch. The displacement is
    added to that output.
    """
    if not has_resid_mid(layer):
        raise UnknownLayout(f"site: {bank.site}: the branches of {type(layer).__name__} do not follow one another")
    layer_input = input_reader(layer, bank.site)
    bank.allocate_layer_input()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, residual, _ = layer_input(args, kwargs)
        x = hidden.float() if residual is None else hidden.float() + residual.float()
        x = x.reshape(-1, bank.width)
        bank.layer_input[: x.shape[0]].copy_(x)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden, *rest = (output,) if isinstance(output, Tensor) else output
        tokens = hidden.reshape(-1, bank.width).shape[0]
        edited = steered(bank, hidden, bank.layer_input[:tokens].reshape(hidden.shape))
        return edited if isinstance(output, Tensor) else (edited, *rest)

    layer.add_module("rudder_resid_mid", bank)
    layer.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_hook(after)


def hook_mlp_input(module: nn.Module, output_module: nn.Module, bank: SiteBank) -> None:
    """Edit the first argument of an MLP. `output_module`: the one whose output is added to the residual stream.

    In float16 no bound on the input keeps the MLP's own products finite. What it makes of an edited token is left out
    where it is not finite, and the edit counts as rejected.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (steered(bank, args[0]), *args[1:])

    def finite(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden, *rest = (output,) if isinstance(output, Tensor) else output
        if hidden.dtype != torch.float16:
            return output
        flat = hidden.reshape(-1, bank.width)
        lost = ~flat.isfinite().all(1) & bank.edited[:, : len(flat)].any(0).any(1)
        bank.reject(lost)
        kept = torch.where(lost[:, None], 0.0, flat).reshape(hidden.shape)
        return kept if isinstance(output, Tensor) else (kept, *rest)

    module.add_module("rudder_mlp_in", bank)
    module.register_forward_pre_hook(hook)
    output_module.register_forward_hook(finite)


def steered(bank: SiteBank, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
    """Add the bank's displacement to `hidden`: in float32, so that it is rounded only once."""
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    move: Tensor = bank(x.reshape(-1, bank.width)).reshape(hidden.shape)
    edited = hidden.float() + move
    if hidden.dtype == torch.float16:
        # The bank bounds the sum, of which either part alone may leave the range. What arrives infinite stays so.
        bound = torch.finfo(hidden.dtype).max
        edited = torch.where(hidden.isfinite(), edited.clamp(-bound, bound), edited)
    return edited.to(hidden.dtype)
