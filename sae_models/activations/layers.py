"""How a decoder layer represents the residual stream: what a hook on it needs to know, and the arguments it sees."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from rudder.sae_models.errors import UserError


class UnknownLayout(UserError):
    """The model has no such site, or what a hook would read there is not what the site's name says."""


class LayerInput(NamedTuple):
    """A layer's input: hidden states, residual or None, and the index of the former in its arguments.

    hidden_index is None where hidden states are a keyword argument.
    """

    hidden: Tensor
    residual: Tensor | None
    hidden_index: int | None


@dataclass(frozen=True)
class Branch:
    """A module inside a layer: the layer adds its output, times `factor`, to the residual stream."""

    path: str
    factor: float = 1.0


@dataclass(frozen=True)
class Reading:
    """How one layer represents the residual stream.

    input_is_sum, output_is_sum: the stream is hidden + residual there, else hidden. mlp_input: path of the module that
    reads the MLP's input. refusals: why a hook point is not served; a point without an entry is served.
    """

    layer: str
    input_is_sum: bool = False
    output_is_sum: bool = False
    attention: Branch | None = None
    mlp: Branch | None = None
    mlp_input: str | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)

    def check(self, site: str, point: str) -> None:
        """Raise UnknownLayout if a hook point is not served; `site`: its full name."""
        if point in self.refusals:
            raise UnknownLayout(f"site: {site}: {self.layer}: {self.refusals[point]}")

    def branch(self, point: str) -> Branch:
        """Return the branch of attn_out, resid_mid (that of attn_out) or mlp_out. The point must be served."""
        branch = self.mlp if point == "mlp_out" else self.attention
        assert branch is not None
        return branch


def input_reader(layer: nn.Module, name: str) -> Callable[[Any, Any], LayerInput]:
    """Make a function of a layer's (args, kwargs) that returns its LayerInput. `name` is named in the error."""
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise UnknownLayout(f"site: {name}: {type(layer).__name__} takes no hidden_states")
    hidden_index = names.index("hidden_states")
    residual_index = names.index("residual") if "residual" in names else len(names)

    def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInput:
        positional = args[residual_index] if residual_index < len(args) else None
        residual = kwargs.get("residual", positional)
        if not isinstance(residual, Tensor):
            residual = None
        if "hidden_states" in kwargs:
            return LayerInput(kwargs["hidden_states"], residual, None)
        return LayerInput(args[hidden_index], residual, hidden_index)

    return layer_input


def output_parts(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return a module's (hidden, residual); residual is None unless it is a tensor in the shape of hidden."""
    if isinstance(output, Tensor):
        return output, None
    hidden, *rest = output
    paired = rest and isinstance(rest[0], Tensor) and isinstance(hidden, Tensor) and rest[0].shape == hidden.shape
    return hidden, rest[0] if paired else None


def replace_first_tensor(args: Any, kwargs: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """Apply `change` to the first argument of a module, positional or not."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, kwargs | {name: change(kwargs[name])}
