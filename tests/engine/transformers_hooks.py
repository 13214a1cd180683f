"""The same edits on the transformers implementation, by plain hooks and a loop over tokens in float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rudder.server.program import wire

LAYERS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")
ATTENTION = ("self_attn", "attn", "attention")


def load(folder: Path) -> nn.Module:
    """The model in float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Its decoder layers."""
    named: dict[str, Any] = dict(model.named_modules())
    layers: nn.ModuleList = next(named[name] for name in LAYERS if name in named)
    return layers


def module_of(model: nn.Module, site: str) -> tuple[nn.Module, bool]:
    """(module, True) where a site is the module's input, (module, False) where it is its output."""
    _, number, point = site.split(".")
    layer: Any = layers_of(model)[int(number)]
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    if point == "resid_pre":
        return layer, True
    if point == "resid_post":
        return layer, False
    if point == "mlp_out":
        return layer.post_feedforward_layernorm if sandwich else getattr(layer, "mlp", None) or layer.fc2, False
    attention = next(getattr(layer, name) for name in ATTENTION if hasattr(layer, name))
    return layer.post_attention_layernorm if sandwich else attention, False


@contextmanager
def hooked(model: nn.Module, programs: Sequence[wire.Site], sites: Sequence[str], prompt_tokens: int) -> Iterator[None]:
    """Hook one program's edits into the model; position 0 holds BOS and is not edited."""
    handles = []
    for program in programs:
        site = sites[program.site]
        module, takes_input = module_of(model, site)

        def change(x: Tensor, program: wire.Site = program) -> Tensor:
            return torch.cat([x[:, :1], edited(program, x[:, 1:], prompt_tokens - 1)], 1)

        if site.endswith("resid_mid"):
            record, displace = middle_hooks(change)
            layer = layers_of(model)[int(site.split(".")[1])]
            handles.append(layer.register_forward_pre_hook(input_hook(record), with_kwargs=True))
            handles.append(module.register_forward_hook(output_hook(displace)))
        elif takes_input:
            handles.append(module.register_forward_pre_hook(input_hook(change), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(output_hook(change)))
    yield
    for handle in handles:
        handle.remove()


def middle_hooks(change: Any) -> tuple[Any, Any]:
    """Hooks (on a layer's input, on its attention's output) that change the sum of both."""
    inputs: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        inputs.append(x)
        return x

    def displace(added: Tensor) -> Tensor:
        displaced: Tensor = change(inputs[-1] + added) - inputs[-1]
        return displaced

    return record, displace


def input_hook(change: Any) -> Any:
    """A pre-hook that changes a layer's input."""

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    return hook


def output_hook(change: Any) -> Any:
    """A hook that changes a module's output."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output) if output.ndim == 3 else change(output[None])[0]
        return (change(output[0]), *output[1:])

    return hook


def edited(program: wire.Site, x: Tensor, prompt_tokens: int) -> Tensor:
    """Apply a program without a gate to x [1, tokens, d]."""
    rows = [
        tuple(np.frombuffer(data, "<f4").astype(np.float64) for data in (r.encoder, r.decoder)) for r in program.rows
    ]
    y = x[0].double().numpy().copy()
    for t in range(len(y)):
        y[t] = edited_token(program, y[t], rows, t < prompt_tokens)
    return torch.from_numpy(y)[None].to(x.dtype)


def edited_token(program: wire.Site, x: Any, rows: Any, prompt: bool) -> Any:
    """Apply a program to one token, by the definition."""
    norm, y = np.linalg.norm(x), x.copy()
    for edit in program.edits:
        if not (edit.prompt if prompt else edit.generated):
            continue
        row, (encoder, decoder) = program.rows[edit.row], rows[edit.row]
        z = (x @ encoder if len(encoder) else 0.0) + row.bias
        f = z if z > row.threshold else 0.0
        unit = norm if edit.relative else 1.0
        lower, upper = (v * unit if abs(v) < inf else v for v in (edit.lower, edit.upper))
        if f > edit.above:
            y = y + (min(max(edit.scale * f + edit.shift * unit, lower), upper) - f) * decoder
    if program.blend:
        y = y + program.blend.weight * (rows[program.blend.row][1] - y)
    if program.restore_norm:
        y = y * norm / np.linalg.norm(y)
    if program.max_displacement < inf:
        y = x + (y - x) * min(1.0, program.max_displacement * norm / np.linalg.norm(y - x))
    return y
