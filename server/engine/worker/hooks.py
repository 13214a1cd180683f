"""Hook a bank into a model, as its layers were measured (`sae_models/activations/measure.py`).

A decoder layer passes the residual stream on as one tensor, or as a pair (hidden, residual) whose sum it is. The bank
reads the stream, and its displacement is added to `hidden`. A branch may be scaled before it is added to the stream:
the bank reads what is added, and its displacement is divided by that factor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rudder.sae_models.activations.layers import (
    Branch,
    Reading,
    UnknownLayout,
    input_reader,
    output_parts,
    replace_first_tensor,
)
from rudder.sae_models.hookpoints import parse
from rudder.server.engine.worker.bank import SiteBank


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Return the model's decoder layers: its only list of `count` modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise UnknownLayout(f"sites: {type(model).__name__} has {len(lists)} lists of {count} layers, need exactly one")
    return lists[0]


def layer_numbers(sites: Sequence[str], layers: nn.ModuleList) -> list[int]:
    """Return the numbers of the layers that have sites. Raise UnknownLayout where the model has no such layer."""
    numbers = {site: parse(site)[0] for site in sites}
    missing = [site for site, number in numbers.items() if number >= len(layers)]
    if missing:
        raise UnknownLayout(f"site: {missing[0]} of a model with {len(layers)} layers")
    return sorted(set(numbers.values()))


def attach(bank: SiteBank, layers: nn.ModuleList, reading: Reading) -> None:
    """Hook `bank` at its site; `reading` is that of its layer.

    Raises UnknownLayout where what the hook would see is not what the site names: none is left unhooked.
    """
    number, point = parse(bank.site)
    reading.check(bank.site, point)
    layer = layers[number]
    if point == "resid_pre":
        hook_layer_input(layer, bank, reading)
    elif point == "mlp_in":
        hook_mlp_input(layer, bank, reading)
    elif point == "resid_mid":
        hook_middle(layer, bank, reading)
    elif point == "resid_post":
        layer.add_module("rudder_resid_post", bank)
        layer.register_forward_hook(output_hook(bank, is_sum=reading.output_is_sum))
    else:
        branch = reading.branch(point)
        module = layer.get_submodule(branch.path)
        module.add_module("rudder_" + point, bank)
        module.register_forward_hook(output_hook(bank, scaled=register_factor(bank, branch)))


def register_factor(bank: SiteBank, branch: Branch) -> bool:
    """Register a branch's factor [] as a buffer of the bank; return whether it is not 1.

    A buffer, since a measured number must not become a constant of a compiled graph that other weights may run.
    """
    if branch.factor != 1.0:
        bank.register_buffer("factor", torch.tensor(branch.factor, device=bank.token.device), persistent=False)
    return branch.factor != 1.0


def output_hook(bank: SiteBank, is_sum: bool = False, scaled: bool = False) -> Callable[..., Any]:
    """Make a forward hook that edits a module's output; `is_sum`: it is read as the sum of (hidden, residual)."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden, residual = output_parts(output)
        return with_hidden(output, steered(bank, hidden, residual if is_sum else None, scaled))

    return hook


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return a module's output with other hidden states."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def hook_layer_input(layer: nn.Module, bank: SiteBank, reading: Reading) -> None:
    """Edit a layer's input: `hidden_states`, read together with `residual` where the stream is their sum."""
    layer_input = input_reader(layer, bank.site)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        inputs = layer_input(args, kwargs)
        edited = steered(bank, inputs.hidden, inputs.residual if reading.input_is_sum else None)
        if inputs.hidden_index is None:
            return args, kwargs | {"hidden_states": edited}
        return (*args[: inputs.hidden_index], edited, *args[inputs.hidden_index + 1 :]), kwargs

    layer.add_module("rudder_resid_pre", bank)
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def hook_middle(layer: nn.Module, bank: SiteBank, reading: Reading) -> None:
    """Edit the residual stream behind the attention branch.

    No module returns it there: it is the layer's input plus the output of the attention branch. The displacement is
    added to that output.
    """
    layer_input = input_reader(layer, bank.site)
    branch = reading.branch("resid_mid")
    scaled = register_factor(bank, branch)
    bank.allocate_layer_input()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = layer_input(args, kwargs)
        x = inputs.hidden.float()
        if reading.input_is_sum and inputs.residual is not None:
            x = x + inputs.residual.float()
        x = x.reshape(-1, bank.width)
        bank.layer_input[: x.shape[0]].copy_(x)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden, _ = output_parts(output)
        tokens = hidden.reshape(-1, bank.width).shape[0]
        return with_hidden(output, steered(bank, hidden, bank.layer_input[:tokens].reshape(hidden.shape), scaled))

    layer.add_module("rudder_resid_mid", bank)
    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.get_submodule(branch.path).register_forward_hook(after)


def hook_mlp_input(layer: nn.Module, bank: SiteBank, reading: Reading) -> None:
    """Edit the first argument of an MLP.

    In float16 no bound on the input keeps the MLP's own products finite. What it makes of an edited token is left out
    where it is not finite, and the edit counts as rejected.
    """
    module = layer.get_submodule(reading.mlp_input or "")
    output_module = layer.get_submodule(reading.mlp.path) if reading.mlp else module

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return replace_first_tensor(args, kwargs, lambda x: steered(bank, x))

    def finite(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden, _ = output_parts(output)
        if hidden.dtype != torch.float16:
            return output
        flat = hidden.reshape(-1, bank.width)
        lost = ~flat.isfinite().all(1) & bank.edited[:, : len(flat)].any(0).any(1)
        bank.reject(lost)
        return with_hidden(output, torch.where(lost[:, None], 0.0, flat).reshape(hidden.shape))

    module.add_module("rudder_mlp_in", bank)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    output_module.register_forward_hook(finite)


def steered(bank: SiteBank, hidden: Tensor, residual: Tensor | None = None, scaled: bool = False) -> Tensor:
    """Add the bank's displacement to `hidden`: in float32, so that it is rounded only once.

    The bank reads `hidden`, times the bank's factor where it is `scaled` and plus `residual` where there is one.
    """
    added = hidden.float() * bank.factor if scaled else hidden.float()
    x = added if residual is None else added + residual.float()
    move: Tensor = bank(x.reshape(-1, bank.width)).reshape(hidden.shape)
    edited = hidden.float() + (move / bank.factor if scaled else move)
    if hidden.dtype == torch.float16:
        # The bank bounds the sum, of which either part alone may leave the range. What arrives infinite stays so.
        bound = torch.finfo(hidden.dtype).max
        edited = torch.where(hidden.isfinite(), edited.clamp(-bound, bound), edited)
    return edited.to(hidden.dtype)
