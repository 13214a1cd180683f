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
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
# Model types whose branches do not end in the modules named attention and MLP, or whose MLP is no module.
SANDWICH = ("post_attention_layernorm", "post_feedforward_layernorm", "mlp")
BRANCHES = {
    # BLOOM's modules add the stream to their output: their last linear layer does not.
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm", "mlp"),
    "olmo2": SANDWICH,
    "opt": ("self_attn", "fc2", "fc1"),
}


def load(folder: Path) -> nn.Module:
    """The model in float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Its decoder layers."""
    named: dict[str, Any] = dict(model.named_modules())
    layers: nn.ModuleList = next(named[name] for name in LAYERS if name in named)
    return layers


def paths_of(model: nn.Module) -> tuple[str, str, str]:
    """Paths in a layer: the modules whose outputs it adds to the stream, and the module that reads the MLP's input."""
    kind = str(getattr(model.config, "model_type"))  # noqa: B009
    if kind in BRANCHES:
        return BRANCHES[kind]
    names = dict(layers_of(model)[0].named_children())
    attention = next(name for name in ATTENTION if name in names)
    return attention, "mlp", "mlp"


def factor_of(model: nn.Module, site: str) -> float:
    """What a branch's output is multiplied by before it is added to the stream."""
    is_branch = site.endswith(("attn_out", "resid_mid", "mlp_out"))
    return getattr(model.config, "residual_multiplier", 1.0) if is_branch else 1.0


def module_of(model: nn.Module, site: str) -> tuple[nn.Module, bool]:
    """(module, True) where a site is the module's input, (module, False) where it is its output."""
    _, number, point = site.split(".")
    layer = layers_of(model)[int(number)]
    if point in ("resid_pre", "resid_post"):
        return layer, point == "resid_pre"
    attention, mlp, mlp_input = paths_of(model)
    path = {"attn_out": attention, "resid_mid": attention, "mlp_in": mlp_input, "mlp_out": mlp}[point]
    return layer.get_submodule(path), point == "mlp_in"


@contextmanager
def hooked(model: nn.Module, programs: Sequence[wire.Site], sites: Sequence[str], prompt_tokens: int) -> Iterator[None]:
    """Hook one program's edits into the model; position 0 holds BOS and is not edited."""
    handles = []
    for program in programs:
        site = sites[program.site]
        module, takes_input = module_of(model, site)
        factor = factor_of(model, site)

        def change(x: Tensor, program: wire.Site = program) -> Tensor:
            # OPT flattens batch and tokens.
            tokens = x if x.ndim == 3 else x[None]
            return torch.cat([tokens[:, :1], edited(program, tokens[:, 1:], prompt_tokens - 1)], 1).view_as(x)

        if site.endswith("resid_mid"):
            record, displace = middle_hooks(change, factor)
            layer = layers_of(model)[int(site.split(".")[1])]
            handles.append(layer.register_forward_pre_hook(input_hook(record), with_kwargs=True))
            handles.append(module.register_forward_hook(output_hook(displace)))
        elif takes_input:
            handles.append(module.register_forward_pre_hook(input_hook(change), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(output_hook(scaled(change, factor))))
    yield
    for handle in handles:
        handle.remove()


def scaled(change: Any, factor: float) -> Any:
    """A change of a branch's output, from a change of what the layer adds to the stream."""
    return lambda x: change(x * factor) / factor


def middle_hooks(change: Any, factor: float) -> tuple[Any, Any]:
    """Hooks (on a layer's input, on its attention's output) that change the former plus `factor` times the latter."""
    inputs: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        inputs.append(x)
        return x

    def displace(added: Tensor) -> Tensor:
        displaced: Tensor = (change(inputs[-1] + factor * added) - inputs[-1]) / factor
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
            return change(output)
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
