"""Step 5: the trainer's speed against its encoder product alone, its memory, and its Triton kernels.

At 65,536 latents of width 4,096 on random activations.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.sparse import kernels
from rudder.sae_models.training import trainer
from tests.gpu import peer
from tests.gpu.report import NO_GPU, Figures, Report, arguments

PRODUCT = "encoder product"
CASES = ("topk", "batch_topk", "jumprelu")
# Of a sum of `d` float32 products in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Size:
    """Sizes of the benchmark."""

    d: int
    latents: int
    batch: int
    steps: int
    k: int = 64
    warm_up: int = 3


FULL, TINY = Size(4096, 65536, 8192, 12), Size(64, 1024, 256, 3, k=8)


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], Any], size: Size) -> float:
    """Return the median seconds of a step after some that are not counted."""
    times = []
    for _ in range(size.warm_up + size.steps):
        begin = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[size.warm_up :])


def activations(size: Size, device: torch.device) -> Tensor:
    """Return random activations [batch, d] that lie near a space of a quarter of the dimensions."""
    generator = torch.Generator(device).manual_seed(0)
    mixing = torch.randn(size.d // 4, size.d, generator=generator, device=device)
    coefficients = torch.randn(size.batch, size.d // 4, generator=generator, device=device)
    noise = torch.randn(size.batch, size.d, generator=generator, device=device)
    x: Tensor = coefficients @ mixing / (size.d // 4) ** 0.5 + 0.1 * noise
    return x


def encoder_product(size: Size, device: torch.device) -> Figures:
    """Measure the product of a batch with the encoder, in bfloat16: the least that a step of any SAE computes."""
    x = activations(size, device).bfloat16()
    encoder = torch.randn(size.latents, size.d, device=device, dtype=torch.bfloat16)
    seconds = seconds_of(lambda: x @ encoder.T, size)
    operations = 2 * size.batch * size.latents * size.d
    return {"tok_s": size.batch / seconds, "ms": 1e3 * seconds, "tflop_s": operations / seconds / 1e12}


def training(case: str, size: Size, device: torch.device, product_s: float) -> Figures:
    """Measure a training step of an architecture, and the GPU memory that it takes at most."""
    kind = ARCHITECTURES[case]
    config = kind.config_type(latents=size.latents, k=size.k)
    architecture = kind(size.d, config, torch.Generator().manual_seed(0)).to(device)
    run = trainer.Trainer(architecture, trainer.Config(size.batch * (size.warm_up + size.steps)))
    x = activations(size, device)
    run.initialise(x[:4096])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    seconds = seconds_of(lambda: losses.append(float(run.step(x).fvu)), size)
    if not isfinite(losses[-1]):
        raise AssertionError(f"FVU is not finite: {losses}")
    share = {"share_of_product": product_s / seconds} if product_s else {}
    return {"tok_s": size.batch / seconds, "ms": 1e3 * seconds, **share, "fvu": losses[-1], **peak_memory(device)}


def peer_training(size: Size, device: torch.device) -> Figures:
    """Measure a training step of sparsify, with its own Triton kernels on a GPU, on the same activations."""
    step = peer.step(activations(size, device), size.latents, size.k)
    losses: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: losses.append(float(step())), size)
    return {"tok_s": size.batch / seconds, "ms": 1e3 * seconds, "fvu": losses[-1], **peak_memory(device)}


def peak_memory(device: torch.device) -> Figures:
    """Return the GPU memory allocated at most since the last reset."""
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {}


def kernel_errors(size: Size) -> Figures:
    """Compare the Triton kernels on the GPU with dense products in float64, and time them."""
    generator = torch.Generator("cuda").manual_seed(0)
    counts = torch.randint(0, 2 * size.k, (size.batch,), generator=generator, device="cuda")
    # Empty groups, too.
    counts[::7] = 0
    start, total = counts.cumsum(0) - counts, int(counts.sum())
    group = torch.repeat_interleave(torch.arange(size.batch, device="cuda"), counts)
    index = torch.randint(0, size.latents, (total,), generator=generator, device="cuda")
    weight = torch.randn(total, generator=generator, device="cuda")
    rows = torch.randn(size.latents, size.d, generator=generator, device="cuda")
    left = torch.randn(size.batch, size.d, generator=generator, device="cuda")
    sums, dots = kernels.row_sums(rows, index, start, weight), kernels.row_dots(left, rows, group, index, start)
    errors = {}
    for name, ours, expected in (
        ("row_sums", sums[:64], dense_sums(rows, index, group, weight, 64)),
        ("row_dots", dots[:4096], (left[group[:4096]].double() * rows[index[:4096]].double()).sum(1)),
    ):
        errors[f"{name}_error"] = float((ours.double() - expected).abs().max() / expected.abs().max())
        if not errors[f"{name}_error"] <= TOLERANCE:
            raise AssertionError(f"{name}: relative error {errors[f'{name}_error']:.2g}, tolerance {TOLERANCE:.2g}")
    timed = {
        "row_sums_ms": 1e3 * seconds_of(lambda: kernels.row_sums(rows, index, start, weight), size),
        "row_dots_ms": 1e3 * seconds_of(lambda: kernels.row_dots(left, rows, group, index, start), size),
    }
    return errors | timed | {"pairs": total}


def dense_sums(rows: Tensor, index: Tensor, group: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return the weighted sums [groups, d] of the first groups, as a dense product in float64."""
    part = group < groups
    dense = torch.zeros(groups, len(rows), dtype=torch.float64, device=rows.device)
    dense.index_put_((group[part], index[part]), weight[part].double(), accumulate=True)
    return dense @ rows.double()


def main() -> int:
    """Run the step."""
    options = arguments(__doc__)
    size = TINY if options.tiny else FULL
    device = torch.device("cpu" if options.tiny else "cuda")
    suffix = ", tiny on a CPU" if options.tiny else ""
    report = Report(options.out, [f"{name}{suffix}" for name in (PRODUCT, *CASES)])
    product_s: list[float] = []

    def product() -> Figures:
        figures = encoder_product(size, device)
        product_s.append(figures["ms"] / 1e3)
        return figures

    report.run(f"{PRODUCT}{suffix}", product)
    for case in CASES:
        report.run(f"{case}{suffix}", lambda case=case: training(case, size, device, *product_s[:1]))  # type: ignore[misc]
        if not options.tiny:
            torch.cuda.empty_cache()
    if options.tiny:
        report.not_run("Triton kernels equal the dense path", NO_GPU)
        report.not_run("speed and peak memory at 65,536 x 4,096", NO_GPU)
    else:
        report.run("Triton kernels equal the dense path", lambda: kernel_errors(size))
    if peer.is_installed():
        report.run(f"{peer.NAME}: topk{suffix}", lambda: peer_training(size, device))
    else:
        report.not_run(f"{peer.NAME}: topk", "the package is not installed")
    return report.exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
