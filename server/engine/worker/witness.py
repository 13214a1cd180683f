"""An independent reading of the residual stream, with which the self-test compares what the banks read.

The banks take the stream from a layer's arguments and results. Here it is what the layer's first part, a norm or
the attention, is called with: what that part computes on is the residual stream. Behind the last layer, the model's
next part, its final norm, is that part. Hooks do not run in a compiled graph, so the model runs eagerly meanwhile.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rudder.server.engine.worker.bank import SiteBank


@dataclass
class Witness:
    """Records the residual stream behind some layers, and in front of them, by (request handle, boundary).

    Boundary L lies in front of layer L. Values are float32 [tokens, d], of one step each.
    """

    layers: nn.ModuleList
    width: int
    batch: Callable[[], Iterable[tuple[int, int, int]]]
    streams: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    compiled: list[nn.Module] = field(default_factory=list)
    pending: int | None = None

    def attach(self, model: nn.Module, boundaries: Iterable[int]) -> None:
        """Watch these boundaries, and run the model eagerly until `detach`."""
        for module in model.modules():
            if getattr(module, "do_not_compile", True) is False:
                module.do_not_compile = True  # type: ignore[assignment]
                self.compiled.append(module)
        wanted, count = set(boundaries), len(self.layers)
        for boundary in wanted & set(range(count)):
            self.watch_boundary(self.layers[boundary], boundary, self.layers[boundary].children())
        if count in wanted:
            parent = next(m for m in model.modules() if any(child is self.layers for child in m.children()))
            siblings = [child for child in parent.children() if child is not self.layers]
            self.watch_boundary(self.layers[-1], count, siblings, behind=True)

    def watch_boundary(self, layer: nn.Module, boundary: int, parts: Iterable[nn.Module], behind: bool = False) -> None:
        """Record the input of the first of `parts` that is called after `layer` begins, or ends if `behind`."""

        def begin(*_: Any) -> None:
            self.pending = boundary

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.pending == boundary:
                self.pending = None
                self.record(boundary, [*args, *kwargs.values()])

        register = layer.register_forward_hook if behind else layer.register_forward_pre_hook
        self.hooks.append(register(begin))
        # A bank is a part of its layer, too.
        others = [part for part in parts if not isinstance(part, SiteBank)]
        self.hooks += [part.register_forward_pre_hook(record, with_kwargs=True) for part in others]

    def record(self, boundary: int, values: Iterable[Any]) -> None:
        """Split the sum of the vectors among `values` between the requests of the step."""
        vectors = [v.float().reshape(-1, self.width) for v in values if is_vectors(v, self.width)]
        if not vectors:
            return
        stream = torch.stack(vectors).sum(0).detach()
        for handle, offset, length in self.batch():
            self.streams.setdefault((handle, boundary), []).append(stream[offset : offset + length].cpu())

    def detach(self) -> dict[tuple[int, int], bytes]:
        """Return all that was recorded, float32 [tokens, d] each, and leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
        for module in self.compiled:
            module.do_not_compile = False  # type: ignore[assignment]
        return {key: torch.cat(parts).numpy().tobytes() for key, parts in self.streams.items()}


def is_vectors(value: Any, width: int) -> bool:
    """Whether a value holds vectors of the residual stream's width."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and value.shape[-1] == width
