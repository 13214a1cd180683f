"""Training step of each library, as its own trainer takes it, and its weights in canonical form.

Libraries are imported inside functions: each process uses only one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Weights = dict[str, Tensor]
CanonicalWeights = tuple[Weights, int | None]


@dataclass(frozen=True)
class Task:
    """What is trained: a case, its sizes, and the learning rate (None: the library's default)."""

    case: str
    d: int
    latents: int
    k: int
    batch: int
    steps: int
    rate: float | None
    threads: int
    sample: int = 4096
    seed: int = 0

    @property
    def warm_up(self) -> int:
        """Steps of learning-rate warm-up, the same for every library: the libraries' defaults exceed a short run."""
        return max(1, self.steps // 20)

    @property
    def decay(self) -> int:
        """Steps of linear decay at the end, a fifth of the run."""
        return self.steps // 5


class Learner(Protocol):
    """Trainer of a library."""

    def step(self, x: Tensor) -> None:
        """Take one step on a batch [n, d]."""

    def weights(self) -> CanonicalWeights:
        """Return canonical weights by name, and k if the library keeps the k largest latents per token."""


@dataclass
class FunctionLearner:
    """A learner made of two functions."""

    step_function: Callable[[Tensor], Any]
    weights_function: Callable[[], CanonicalWeights]

    def step(self, x: Tensor) -> None:
        """Take one step on a batch [n, d]."""
        self.step_function(x)

    def weights(self) -> CanonicalWeights:
        """Return canonical weights, and k."""
        return self.weights_function()


def learner(library: str, mode: str, task: Task, sample: Tensor) -> Learner:
    """Create a library's trainer for a task. Raise KeyError if the library lacks the case."""
    torch.manual_seed(task.seed)
    base = LEARNERS[library](mode, task, sample)
    if mode == "autocast" and library != "sae-lens":
        return FunctionLearner(autocast(base.step), base.weights)
    return base


def autocast(step: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Wrap a step in bfloat16 autocast."""

    def cast(x: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step(x)

    return cast


def ours(mode: str, task: Task, sample: Tensor) -> Learner:
    """Rudder: `Trainer.step`."""
    from rudder.sae_models.architectures import ARCHITECTURES
    from rudder.sae_models.training import memory, trainer

    memory.keep_freed()
    kind = ARCHITECTURES[task.case]
    rate: dict[str, Any] = {} if task.rate is None else {"learning_rate": task.rate}
    precision: Literal["float32", "bfloat16"] = "bfloat16" if mode == "bfloat16" else "float32"
    config = kind.config_type(latents=task.latents, k=task.k, precision=precision, **rate)
    architecture = kind(task.d, config, torch.Generator().manual_seed(task.seed))
    run = trainer.Trainer(architecture, trainer.Config(task.steps * task.batch, warm_up=0.05, decay=0.2))
    run.initialise(sample)

    def canonical_weights() -> CanonicalWeights:
        sae = run.canonical(sample)
        weights = {name: getattr(sae, name) for name in ("encoder", "bias", "threshold", "decoder", "decoder_bias")}
        return weights, task.k if task.case == "topk" else None

    return FunctionLearner(run.step, canonical_weights)


def sae_lens(mode: str, task: Task, sample: Tensor) -> Learner:
    """SAELens: `SAETrainer.step`. Its sparse activations do not run on a CPU (gradient norm)."""
    import sae_lens as library
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    del sample
    common = {"d_in": task.d, "d_sae": task.latents}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "topk": (library.TopKTrainingSAE, library.TopKTrainingSAEConfig, {"k": task.k}),
        "batch_topk": (library.BatchTopKTrainingSAE, library.BatchTopKTrainingSAEConfig, {"k": task.k}),
        "jumprelu": (
            library.JumpReLUTrainingSAE,
            library.JumpReLUTrainingSAEConfig,
            {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(task.k), "l0_warm_up_steps": task.warm_up},
        ),
        "gated": (library.GatedTrainingSAE, library.GatedTrainingSAEConfig, {"l1_warm_up_steps": task.warm_up}),
    }
    kind, config, rest = kinds[task.case]
    sae = kind(config(**common, **rest))
    rate = {} if task.rate is None else {"lr": task.rate}
    settings = SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        autocast=mode == "autocast",
        lr_end=0.0,
        lr_warm_up_steps=task.warm_up,
        lr_decay_steps=task.decay,
        **rate,
    )
    run = SAETrainer(settings, sae, iter(()))
    return FunctionLearner(run.step, lambda: sae_lens_weights(sae, task))


def sae_lens_weights(sae: Any, task: Task) -> CanonicalWeights:
    """Return canonical weights of a SAELens training SAE; decoder norms and pre-encoder bias are folded."""
    encoder, decoder, decoder_bias = sae.W_enc.T, sae.W_dec, sae.b_dec
    norm = decoder.norm(dim=1) if task.case in ("topk", "batch_topk") else torch.ones(task.latents)
    if task.case == "gated":
        gain = sae.r_mag.exp()
        threshold = (sae.b_mag - gain * sae.b_gate).clamp(min=0)
        encoder, bias = encoder * gain[:, None], sae.b_mag
    else:
        bias = sae.b_enc
        threshold = getattr(sae, "threshold", getattr(sae, "topk_threshold", torch.zeros(()))).float()
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - encoder @ decoder_bias
    weights = {
        "encoder": encoder * norm[:, None],
        "bias": bias * norm,
        "threshold": threshold.expand(task.latents).clone(),
        "decoder": decoder / norm[:, None],
        "decoder_bias": decoder_bias,
    }
    return weights, task.k if task.case == "topk" else None


def dictionary_learning(mode: str, task: Task, sample: Tensor) -> Learner:
    """dictionary_learning: `update` of its trainers."""
    from dictionary_learning import trainers

    del mode, sample
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "topk": (trainers.TopKTrainer, {"k": task.k, "threshold_start_step": 0}),
        "batch_topk": (trainers.BatchTopKTrainer, {"k": task.k, "threshold_start_step": 0}),
        "jumprelu": (trainers.JumpReluTrainer, {"target_l0": float(task.k), "sparsity_warmup_steps": task.warm_up}),
        "gated": (trainers.GatedSAETrainer, {"sparsity_warmup_steps": task.warm_up}),
    }
    kind, rest = kinds[task.case]
    if task.rate is not None:
        rest = rest | {"lr": task.rate}
    names = {"layer": 0, "lm_name": "none", "device": "cpu", "seed": task.seed}
    sizes = {"activation_dim": task.d, "dict_size": task.latents, "steps": task.steps}
    times = {"warmup_steps": task.warm_up, "decay_start": task.steps - task.decay}
    run = kind(**names, **sizes, **times, **rest)
    count = iter(range(task.steps + 1))
    return FunctionLearner(lambda x: run.update(next(count), x.clone()), lambda: dictionary_weights(run.ae, task))


def dictionary_weights(ae: Any, task: Task) -> CanonicalWeights:
    """Return canonical weights of a dictionary_learning autoencoder."""
    if task.case == "jumprelu":
        encoder, bias, decoder, decoder_bias = ae.W_enc.T, ae.b_enc, ae.W_dec, ae.b_dec
        threshold = ae.threshold.clamp(min=0)
    elif task.case == "gated":
        gain, decoder, decoder_bias = ae.r_mag.exp(), ae.decoder.weight.T, ae.decoder_bias
        encoder = ae.encoder.weight * gain[:, None]
        bias = ae.mag_bias - encoder @ decoder_bias
        threshold = (ae.mag_bias - gain * ae.gate_bias).clamp(min=0)
    else:
        encoder, decoder, decoder_bias = ae.encoder.weight, ae.decoder.weight.T, ae.b_dec
        bias = ae.encoder.bias - encoder @ decoder_bias
        threshold = torch.as_tensor(ae.threshold if task.case == "batch_topk" else 0.0).clamp(min=0)
    weights = {
        "encoder": encoder,
        "bias": bias,
        "threshold": threshold.float().expand(task.latents).clone(),
        "decoder": decoder,
        "decoder_bias": decoder_bias,
    }
    return weights, task.k if task.case == "topk" else None


def sparsify(mode: str, task: Task, sample: Tensor) -> Learner:
    """EleutherAI sparsify: the step of `Trainer.fit`, which the library ties to hooks on a model, rebuilt from its own
    modules with its default optimiser.
    """
    from schedulefree import ScheduleFreeWrapper  # type: ignore[import-not-found]
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    del mode
    if task.case != "topk":
        raise KeyError(task.case)
    coder = SparseCoder(task.d, SparseCoderConfig(num_latents=task.latents, k=task.k), "cpu", torch.float32)
    coder.b_dec.data = sample.mean(0)
    rate = task.rate or 5e-3 / (task.latents / 2**14) ** 0.5
    optimiser = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
    optimiser.train()

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        output = coder(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        output.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    def canonical_weights() -> CanonicalWeights:
        optimiser.eval()
        encoder, decoder = coder.encoder.weight, coder.W_dec
        weights = {
            "encoder": encoder,
            "bias": coder.encoder.bias - encoder @ coder.b_dec,
            "threshold": torch.zeros(task.latents),
            "decoder": decoder,
            "decoder_bias": coder.b_dec,
        }
        return weights, task.k

    return FunctionLearner(step, canonical_weights)


LEARNERS: dict[str, Callable[[str, Task, Tensor], Learner]] = {
    "ours": ours,
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
    "eai-sparsify": sparsify,
}
