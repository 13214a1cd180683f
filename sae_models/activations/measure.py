"""Measure how a decoder layer represents the residual stream, by dummy passes with random inputs.

A layer's class and the names of its modules do not tell: a second return value may be half of the stream or stale, a
branch may be scaled or normalised before it is added. Each relation below is measured on the loaded layer, and a hook
point at which one does not hold is refused with the relation and its relative error:

    resid_pre             the output depends on (hidden, residual) through their sum, or on hidden alone
    attn_out, mlp_out     resid_pre + attn_out + mlp_out = resid_post, also when either is edited
    resid_mid             mlp_out depends on resid_pre and attn_out through their sum
    mlp_in                mlp_out depends on it, and attn_out does not
    resid_post            it is the resid_pre of the next layer
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rudder.sae_models.activations.layers import Branch, Reading
from rudder.sae_models.activations.probe import MLP_INPUTS, Change, LayerProbe, Pass, PassEnded
from rudder.sae_models.hookpoints import POINTS

BRANCH_POINTS = ("attn_out", "resid_mid", "mlp_out")
ADDS_UP = "resid_pre + attn_out + mlp_out = resid_post"
# Relative errors that rounding explains: a multiple of the data type's epsilon, and at min_error this.
MIN_TOLERANCE = 1e-3
EPSILONS = 4
# A module that normalises, routes or multiplies enlarges the rounding of its input.
AMPLIFICATION = 4
# A coefficient of a branch below this is no branch: another module's output is the whole difference.
MIN_FACTOR = 1e-2
# A branch's factor this near to 1 is 1: it was measured through rounded sums.
ROUNDED = 5e-3
# Of two pairs of modules, one adds up better if its error is smaller by this factor.
DISTINCT = 2.0
DONE = object()


def relative_error(x: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Return |x - expected| / |scale|, where scale is `expected` unless given; inf if it is not finite."""
    unit = float((expected if scale is None else scale).norm())
    error = float((x.to(expected.device) - expected).norm()) / max(unit, 1e-30)
    return error if error == error else float("inf")


def median_error(x: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of the relative error: rounding may send a few tokens to other experts."""
    errors = (x - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    return float(errors.nan_to_num(float("inf")).median())


def stream(parts: Sequence[Tensor | None], is_sum: bool) -> Tensor:
    """Return the residual stream of (hidden, residual)."""
    hidden, residual = parts
    assert hidden is not None
    return hidden + residual if is_sum and residual is not None else hidden


class Fit(NamedTuple):
    """delta = factors[0] * first + factors[1] * second, with its relative error."""

    error: float
    factors: tuple[float, float]
    paths: tuple[str, str]


def fit_branches(delta: Tensor, modules: Mapping[str, Tensor], tolerance: float) -> Fit:
    """Find the two modules of whose outputs `delta` [tokens, d] is a sum, up to a factor each.

    Of the pairs in the shallowest depth at which one adds up within `tolerance`, or of all if none does, the best. Of
    equals those that ran last: the norm behind a branch multiplies by a constant where the branch is small.
    """
    paths = list(modules)
    best = Fit(float("inf"), (0.0, 0.0), ("", ""))
    if len(paths) < 2:
        return best
    outputs = torch.stack([modules[path].flatten().double() for path in paths])
    target = delta.flatten().double()
    gram, product = (outputs @ outputs.T).cpu(), (outputs @ target).cpu()
    square = float(target @ target)
    depths = [path.count(".") for path in paths]
    for depth in sorted(set(depths)):
        pairs = [pair for pair in combinations(range(len(paths)), 2) if max(depths[i] for i in pair) == depth]
        fits = [Fit(*solve_pair(gram, product, square, pair), (paths[pair[0]], paths[pair[1]])) for pair in pairs]
        min_error = min((fit.error for fit in fits), default=best.error)
        if min_error < best.error:
            # Pairs are in call order.
            best = next(fit for fit in reversed(fits) if fit.error <= DISTINCT * min_error)
        if best.error < tolerance:
            return best
    return best


def solve_pair(
    gram: Tensor, product: Tensor, square: float, pair: tuple[int, int]
) -> tuple[float, tuple[float, float]]:
    """Solve the normal equations of two modules: relative error and factors; inf where they are no two branches."""
    at = torch.tensor(pair)
    matrix, right = gram[at][:, at], product[at]
    failed = float("inf"), (0.0, 0.0)
    if not float(torch.linalg.det(matrix)) > 1e-9 * float(matrix[0, 0] * matrix[1, 1]):
        return failed
    factors = torch.linalg.solve(matrix, right)
    first, second = float(factors[0]), float(factors[1])
    if not min(abs(first), abs(second)) >= MIN_FACTOR:
        return failed
    error = (max(square - float(right @ factors), 0.0) / max(square, 1e-30)) ** 0.5
    # Below this, differences of float64 sums are noise, and exact pairs would be ordered by it.
    return max(error, 1e-7), (first, second)


class Trial:
    """The passes of one layer and what they show."""

    def __init__(self, probe: LayerProbe) -> None:
        self.probe, self.name = probe, type(probe.layer).__name__
        self.refusals: dict[str, str] = {}
        self.base: Pass | None = None
        self.input_is_sum: bool | None = None
        self.fits: dict[bool, Fit] = {}
        self.parallel = self.swapped = False

    def steps(self) -> Iterator[None]:
        """Set the change of the next pass before each yield, and read what it shows after it."""
        probe = self.probe
        yield
        reason = unusable(probe.seen)
        if reason:
            self.refuse(POINTS, reason)
            return
        self.tolerance = max(MIN_TOLERANCE, EPSILONS * torch.finfo(probe.dtype).eps)
        self.amplified_tolerance = AMPLIFICATION * self.tolerance
        probe.change = Change(probe.random(1.0), probe.random(1.0))
        yield
        scale = branch_scale(probe.seen)
        self.hidden, self.residual, self.move = (probe.random(scale) for _ in range(3))
        # Large enough that a norm behind a branch is no multiplication by a constant.
        self.edit = probe.random(max(scale, 1.0))
        probe.change = Change(self.hidden, self.residual)
        yield
        self.base = probe.seen
        yield from self.input_steps(self.base)
        if self.input_is_sum is None:
            return
        self.fit(self.base)
        yield from self.mlp_input_steps(self.base)
        if self.fits:
            yield from self.branch_steps(self.base)

    def input_steps(self, base: Pass) -> Iterator[None]:
        """Measure whether the layer reads hidden + residual, hidden alone, or neither."""
        if base.inputs[1] is None:
            self.input_is_sum = False
            return
        self.probe.change = Change(self.hidden, self.residual + self.move)
        yield
        if part_error(self.probe.seen, base) < self.tolerance:
            self.input_is_sum = False
            return
        self.probe.change = Change(self.hidden - self.move, self.residual + self.move)
        yield
        error = part_error(self.probe.seen, base)
        if error < self.amplified_tolerance:
            self.input_is_sum = True
        else:
            depends = "its output depends on hidden_states and residual otherwise than through their sum"
            self.refuse(POINTS, f"{depends}: relative error {error:.2g}")

    def fit(self, base: Pass) -> None:
        """Find the branches, and with them how the output is to be read."""
        single = {path: x for path, x in base.modules.items() if path not in base.repeated}
        before = stream(base.inputs, bool(self.input_is_sum))
        readings = (False,) if base.output[1] is None else (False, True)
        fits = {
            is_sum: fit_branches(stream(base.output, is_sum) - before, single, self.tolerance) for is_sum in readings
        }
        is_sum, best = min(fits.items(), key=lambda item: item[1].error)
        if best.error < self.tolerance:
            self.fits = {is_sum: best}
        else:
            best_error = f"relative error {best.error:.2g}" if best.paths[0] else "none are two branches"
            self.refuse(BRANCH_POINTS, f"{ADDS_UP} holds for no two of its modules: {best_error}")

    def branch_steps(self, base: Pass) -> Iterator[None]:
        """Edit each branch: it must act as asked, and the MLP must read the stream behind the attention branch."""
        ((is_sum, fit),) = self.fits.items()
        probe, (first, second) = self.probe, fit.paths
        forced = base.modules[first] + self.edit / fit.factors[0]
        probe.change = Change(self.hidden, self.residual, {first: forced})
        yield
        attention = probe.seen
        forced = base.modules[second] + self.edit / fit.factors[1]
        probe.change = Change(self.hidden, self.residual, {second: forced})
        yield
        errors = [self.sum_error(attention, is_sum, fit), self.sum_error(probe.seen, is_sum, fit)]
        if not max(errors) < self.amplified_tolerance:
            self.refuse(BRANCH_POINTS, f"{ADDS_UP} does not hold after an edit: relative error {max(errors):.2g}")
            self.fits = {}
            return
        self.parallel = median_error(attention.modules[second], base.modules[second]) < self.tolerance
        if self.parallel:
            self.refuse(("resid_mid",), "its branches do not follow one another: both read resid_pre")
        probe.change = Change(self.hidden + self.edit, self.residual, {first: base.modules[first]})
        yield
        error = median_error(probe.seen.modules[second], attention.modules[second])
        if not self.parallel and not error < self.amplified_tolerance:
            depends = "mlp_out depends on resid_pre and attn_out otherwise than through their sum"
            self.refuse(("resid_mid",), f"{depends}: relative error {error:.2g}")

    def mlp_input_steps(self, base: Pass) -> Iterator[None]:
        """Move the MLP's input: mlp_out must move (without branches: the layer's output), attn_out must not."""
        if self.probe.mlp_input is None:
            self.refuse(("mlp_in",), f"it has none of {', '.join(MLP_INPUTS)}")
            return
        self.probe.change = Change(self.hidden, self.residual, input_moves={self.probe.mlp_input: self.move})
        yield
        moved = self.probe.seen
        if not self.fits:
            if part_error(moved, base) < self.tolerance:
                self.refuse(("mlp_in",), f"its output does not depend on the input of {self.probe.mlp_input}")
            return
        ((_, fit),) = self.fits.items()
        changed = [median_error(moved.modules[path], base.modules[path]) > self.tolerance for path in fit.paths]
        if changed.count(True) != 1:
            which = "both branches depend" if all(changed) else "neither branch depends"
            self.refuse(("mlp_in",), f"{which} on the input of {self.probe.mlp_input}")
        # Parallel branches may run in either order.
        self.swapped = changed == [True, False]

    def sum_error(self, seen: Pass, is_sum: bool, fit: Fit) -> float:
        """Return the relative error of ADDS_UP in a pass."""
        before = stream(seen.inputs, bool(self.input_is_sum))
        added = sum(factor * seen.modules[path] for path, factor in zip(fit.paths, fit.factors, strict=True))
        delta = stream(seen.output, is_sum) - before
        return relative_error(torch.as_tensor(added), delta)

    def refuse(self, points: Iterable[str], reason: str) -> None:
        """Refuse hook points; the first reason stands."""
        for point in points:
            self.refusals.setdefault(point, reason)

    def reading(self, following: "Trial | None") -> Reading:
        """Return the result; `following`: the next layer's trial, None behind the last layer."""
        attention = mlp = None
        for fit in self.fits.values():
            branches = [Branch(path, snapped(factor)) for path, factor in zip(fit.paths, fit.factors, strict=True)]
            attention, mlp = reversed(branches) if self.swapped else branches
        return Reading(
            self.name, bool(self.input_is_sum), self.output_reading(following), attention, mlp,
            self.probe.mlp_input, self.refusals,
        )  # fmt: skip

    def output_reading(self, following: "Trial | None") -> bool:
        """Return whether the output is read as a sum, and refuse resid_post unless it is the next layer's resid_pre."""
        base = self.base
        if base is None:
            return False
        readings = list(self.fits) or ([False] if base.output[1] is None else [False, True])
        if following is None:
            if len(readings) > 1:
                self.refuse(("resid_post",), self.refusals.get("mlp_out", ADDS_UP))
            return readings[0]
        if following.base is None or following.input_is_sum is None:
            reason = following.refusals.get("resid_pre", "it cannot be read")
            self.refuse(("resid_post",), f"the next layer's resid_pre is unknown: {reason}")
            return readings[0]
        arrived = stream(following.base.arrived, following.input_is_sum)
        errors = {is_sum: relative_error(stream(base.output, is_sum), arrived) for is_sum in readings}
        is_sum, error = min(errors.items(), key=lambda item: item[1])
        if not error < self.tolerance:
            reason = "resid_post is not the next layer's resid_pre"
            self.refuse(("resid_post",), f"{reason}: relative error {error:.2g}")
        return is_sum


def unusable(seen: Pass) -> str:
    """Return why a layer cannot be measured, or an empty text."""
    if seen.calls != 1:
        return f"it runs {seen.calls} times in a forward pass"
    if seen.arrived[0] is None or seen.output[0] is None:
        return "it does not pass on one vector of the model's width per token: there may be several residual streams"
    return ""


def branch_scale(seen: Pass) -> float:
    """Return the root mean square of the last module's output: inputs of that size hide neither term of a sum."""
    outputs = [x for path, x in seen.modules.items() if "." not in path]
    scale = float(outputs[-1].square().mean().sqrt()) if outputs else 1.0
    return min(max(scale, 1e-3), 1e3) if scale == scale else 1.0


def part_error(seen: Pass, base: Pass) -> float:
    """Return the error of a layer's hidden states between two passes."""
    ours, theirs = seen.output[0], base.output[0]
    return median_error(ours, theirs) if ours is not None and theirs is not None else float("inf")


def snapped(factor: float) -> float:
    """Return 1 for a factor that differs from it by rounding."""
    return 1.0 if abs(factor - 1.0) < ROUNDED else factor


def measure(
    layers: nn.ModuleList, numbers: Iterable[int], tokens: int, width: int, run: Callable[[], None]
) -> dict[int, Reading]:
    """Measure the layers `numbers` by calling `run` a few times: one forward pass of the model over `tokens` tokens.

    Every layer gets random inputs of its own, so the passes serve all of them. `width`: d. Raises UnknownLayout where a
    layer has no hidden states.
    """
    measured = sorted(set(numbers))
    probes = {
        number: LayerProbe(layers[number], number, tokens, width)
        for number in sorted({*measured, *(number + 1 for number in measured)})
        if number < len(layers)
    }
    with ExitStack() as stack, torch.no_grad():
        for probe in probes.values():
            probe.hook(stack)
        trials = {number: Trial(probe) for number, probe in probes.items()}
        steps = [trial.steps() for trial in trials.values()]
        last = probes[max(probes)]
        while steps := [step for step in steps if next(step, DONE) is not DONE]:
            for probe in probes.values():
                probe.seen = Pass()
            # The first pass is a whole one: it shows whether a layer runs again.
            with suppress(PassEnded):
                run()
            last.ends_pass = True
    return {number: trials[number].reading(trials.get(number + 1)) for number in measured}
