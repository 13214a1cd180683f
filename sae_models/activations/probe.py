"""Record and change what passes through a decoder layer in dummy passes."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rudder.sae_models.activations.layers import input_reader, output_parts, replace_first_tensor

# Modules that read the input of the MLP; the first that a layer has is measured.
MLP_INPUTS = ("intermediate", "mlp", "fc1", "feed_forward", "block_sparse_moe", "ffn", "moe")
# Modules this deep inside a layer are candidates for its branches; shallow ones are preferred.
MAX_DEPTH = 3
SEED = 0


@dataclass
class Pass:
    """What one dummy pass shows of a layer, flattened to [tokens, d] in float32.

    arrived: (hidden, residual) as the layer before returned them. inputs: as the layer was run. output: as it returned.
    modules: output of each module by path, in call order. calls: how often the layer ran.
    """

    arrived: list[Tensor | None] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    output: list[Tensor | None] = field(default_factory=list)
    modules: dict[str, Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    calls: int = 0


@dataclass
class Change:
    """What one dummy pass changes in a layer: its input, and by path outputs and inputs of modules, all [tokens, d]."""

    hidden: Tensor | None = None
    residual: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    input_moves: dict[str, Tensor] = field(default_factory=dict)


class PassEnded(Exception):
    """Raised in a layer to leave the model's forward pass."""


class LayerProbe:
    """Records and changes what passes through one layer."""

    def __init__(self, layer: nn.Module, number: int, tokens: int, width: int) -> None:
        self.layer, self.tokens, self.width = layer, tokens, width
        self.read_input = input_reader(layer, f"layers.{number}")
        self.paths = [path for path, _ in layer.named_modules() if path and path.count(".") < MAX_DEPTH]
        named = (path for path in MLP_INPUTS if isinstance(getattr(layer, path, None), nn.Module))
        self.mlp_input = next(named, None)
        self.change, self.seen = Change(), Pass()
        self.ends_pass = False
        self.generator = torch.Generator().manual_seed(SEED + number)

    def hook(self, stack: ExitStack) -> None:
        """Register hooks that live as long as `stack`."""
        stack.callback(self.layer.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        stack.callback(self.layer.register_forward_hook(self.after).remove)
        for path in self.paths:
            stack.callback(self.layer.get_submodule(path).register_forward_hook(self.record(path)).remove)
        if self.mlp_input:
            module = self.layer.get_submodule(self.mlp_input)
            stack.callback(module.register_forward_pre_hook(self.move_input(self.mlp_input), with_kwargs=True).remove)

    def flat(self, x: Any) -> Tensor | None:
        """Copy x to [tokens, d]; None if it is not one vector of the stream's width per token.

        A copy, since kernels that add and normalise write in place.
        """
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.width,) or x.numel() != self.tokens * self.width:
            return None
        return x.detach().reshape(self.tokens, self.width).float().clone()

    def before(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Record the layer's input and replace it."""
        hidden, residual, index = self.read_input(args, kwargs)
        self.seen.calls += 1
        self.dtype, self.device = hidden.dtype, hidden.device
        self.seen.arrived = [self.flat(hidden), self.flat(residual)]
        if self.change.hidden is not None:
            value = as_like(self.change.hidden, hidden)
            if index is None:
                kwargs = kwargs | {"hidden_states": value}
            else:
                args = (*args[:index], value, *args[index + 1 :])
            hidden = value
        if self.change.residual is not None and residual is not None:
            value = as_like(self.change.residual, residual)
            swapped = tuple(value if arg is residual else arg for arg in args)
            args, kwargs = swapped, {k: value if v is residual else v for k, v in kwargs.items()}
            residual = value
        self.seen.inputs = [self.flat(hidden), self.flat(residual)]
        return args, kwargs

    def after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Record the layer's output, and end the pass if no later layer is measured."""
        self.seen.output = [self.flat(part) for part in output_parts(output)]
        if self.ends_pass:
            raise PassEnded

    def record(self, path: str) -> Callable[..., Any]:
        """Make a hook that records a module's output and replaces it."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor | tuple | list) or not len(output):
                return None
            hidden = output_parts(output)[0]
            if self.flat(hidden) is None:
                return None
            if path in self.seen.modules:
                self.seen.repeated.add(path)
            forced = path in self.change.outputs
            value = as_like(self.change.outputs[path], hidden) if forced else hidden
            copied = self.flat(value)
            assert copied is not None
            self.seen.modules.pop(path, None)
            self.seen.modules[path] = copied
            if not forced:
                return None
            return value if isinstance(output, Tensor) else (value, *output[1:])

        return hook

    def move_input(self, path: str) -> Callable[..., Any]:
        """Make a pre-hook that adds to a module's first argument."""

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            move = self.change.input_moves.get(path)
            if move is None:
                return args, kwargs
            return replace_first_tensor(args, kwargs, lambda x: x + as_like(move, x))

        return hook

    def random(self, scale: float) -> Tensor:
        """Draw normal vectors [tokens, d]: the same on every rank and device."""
        x = torch.randn(self.tokens, self.width, generator=self.generator) * scale
        # What the layer's data type can hold, so that sums and differences are exact where it matters.
        return x.to(self.device, self.dtype).float()


def as_like(x: Tensor, other: Tensor) -> Tensor:
    """Return x in the shape, data type and device of another tensor. A copy: kernels write in place."""
    return x.to(other.device, other.dtype).reshape(other.shape).clone()
