"""Base class of trainable SAEs: weights and their initialisation, unit decoder vectors, AuxK loss, folding."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rudder.sae_models import fidelity
from rudder.sae_models.architectures import offsets
from rudder.sae_models.precision import DTYPES, NamedPrecision, Precision, resolve
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.collectives import SINGLE_PROCESS, Mesh
from rudder.sae_models.sparse.operations import Active, EncoderWeights, Preactivations


@dataclass(frozen=True, kw_only=True)
class Common:
    """Configuration of every architecture. The defaults are those of TopK (arXiv 2406.04093); other architectures cite
    the source of theirs.

    latents: F. k: mean number of active latents per token, enforced or aimed at. precision: dtype of the encoder
    product; auto: the one that the processor is fast at. encoder_norm: initial norm of encoder vectors, which are
    parallel to those of the decoder. offset: initial decoder_bias, `median` (geometric) or `mean`. auxiliary_k: number
    of dead latents per token in the AuxK loss (None: d / 2), weighted by auxiliary_weight. learning_rate, beta1, beta2,
    epsilon: of Adam. gradient_norm: norm to which the gradient is clipped (None: no clipping). density_weight: of the
    penalty of latents that are active on more than a tenth of a batch's tokens (`Architecture.density`; our own).

    TopK is published with beta1 = 0.9; without momentum, as in JumpReLU and Gated (arXiv 2407.14435, 2404.16014), it
    explains more at equal tokens and learning rate: FVU 0.574 against 0.642 after 50 steps at 16,384 latents, 0.183
    against 0.190 on a language model (one seed each).
    """

    latents: int
    k: int = 32
    precision: Precision = "auto"
    encoder_norm: float = 1.0
    offset: str = "median"
    auxiliary_k: int | None = None
    auxiliary_weight: float = 1 / 32
    learning_rate: float | None = None
    beta1: float = 0.0
    beta2: float = 0.999
    epsilon: float = 6.25e-10
    gradient_norm: float | None = None
    density_weight: float = 0.0

    @property
    def rate(self) -> float:
        """Return the learning rate; if unset, 2e-4 / sqrt(F / 2^14)."""
        return self.learning_rate if self.learning_rate is not None else 2e-4 / (self.latents / 2**14) ** 0.5


class State(NamedTuple):
    """Progress of a run: steps taken, fraction of the run completed, and a mask of the dead latents [F]."""

    step: int
    progress: float
    dead: Tensor


class Loss(NamedTuple):
    """Loss of one batch, its detached terms, the FVU, and the activations [m] or [n, F] at the active pairs."""

    total: Tensor
    parts: dict[str, Tensor]
    fvu: Tensor
    values: Tensor
    active: Active


class Architecture(nn.Module):
    """A trainable SAE: encoder [F, d], bias [F], decoder [F, d_out] of unit vectors, decoder_bias [d_out].

    Inputs are scaled to a mean ||x||^2 of d. The encoder reads x - centre, a constant, instead of x - decoder_bias:
    quality is the same, and the gradient of decoder_bias needs no product over all latents.
    """

    config_type: ClassVar[type[Common]] = Common
    config: Common
    # Parameters and buffers that are not per latent: replicated on every rank where latents are sharded.
    REPLICATED: ClassVar[frozenset[str]] = frozenset({"decoder_bias", "centre", "variance"})
    # Whether decoder vectors are kept at unit norm. Otherwise L1 and activations could shrink while decoder norms grow.
    unit: ClassVar[bool] = True
    centre: Tensor
    variance: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.mesh: Mesh = SINGLE_PROCESS
        directions = functional.normalize(torch.randn(config.latents, d, generator=generator), dim=1)
        self.encoder = nn.Parameter(config.encoder_norm * directions)
        self.bias = nn.Parameter(torch.zeros(config.latents))
        self.decoder = nn.Parameter(directions)
        self.decoder_bias = nn.Parameter(torch.zeros(d))
        self.register_buffer("centre", torch.zeros(d))
        self.register_buffer("variance", torch.ones(()))

    @property
    def weights(self) -> EncoderWeights:
        """Encoder, bias and dtype, applied to centred inputs."""
        return EncoderWeights(self.encoder, self.bias, DTYPES[self.precision])

    @property
    def precision(self) -> NamedPrecision:
        """The dtype of the encoder product."""
        return resolve(self.config.precision, self.encoder.device)

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Set centre, decoder_bias and variance from scaled inputs [n, d]; `target`: outputs of a transcoder."""
        del target
        self.centre.copy_(offsets.OFFSETS[self.config.offset](sample))
        self.decoder_bias.copy_(self.centre)
        self.variance.copy_((sample - sample.mean(0)).square().sum(1).mean())

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return the loss of scaled inputs [n, d] ([n, L, d] for a router). `target`: outputs of a transcoder, or
        regression target of a probe.
        """
        raise NotImplementedError

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return the inference form for raw inputs, where the module was trained on raw inputs times `scale`; sample
        [n, d] of scaled inputs sets data-dependent thresholds.
        """
        raise NotImplementedError

    def reconstruct(self, values: Tensor, active: Active) -> Tensor:
        """Return the output [n, d_out] of activations at the active pairs."""
        return self.mesh.latent_all_reduce_sum(active.decode(values, self.decoder, self.unit)) + self.decoder_bias

    def fvu_of_error(self, error: Tensor) -> Tensor:
        """Return the FVU of an error [n, d_out], relative to the variance of the sample of `initialise`."""
        return error.square().sum(1).mean() / self.variance

    def auxiliary(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """AuxK loss (arXiv 2406.04093): reconstruct the error [n, d_out] with the top-k dead latents of centred x.
        Return the fraction of the squared error that remains.
        """
        count = int(self.mesh.latent_all_reduce_sum(dead.sum()))
        if count == 0:
            return x.new_zeros(())
        k = min(self.config.auxiliary_k or x.shape[1] // 2, count)
        weights = EncoderWeights(self.encoder[dead], self.bias[dead], self.weights.precision)
        z, active = sparse.dense_preactivations(self.mesh.latent_copy(x), weights)
        explained = active.decode(
            torch.where(z >= self.kth_largest(z, k), z.relu(), 0.0), self.decoder[dead], self.unit
        )
        error = error.detach()
        # Dividing by the mean over ranks makes the mean of the ranks' losses the fraction of the whole batch's error.
        norm = self.mesh.batch_all_reduce_mean(error.square().sum())
        return (error - self.mesh.latent_all_reduce_sum(explained)).square().sum() / norm

    def top_k(self, x: Tensor, k: int) -> Preactivations:
        """Return the k largest pre-activations of each token of centred x, over all shards of the latents."""
        local = sparse.top_k(self.mesh.latent_copy(x), self.weights, min(k, len(self.bias)))
        if self.mesh.latent_parts == 1:
            return local
        z = local.z.view(len(x), -1)
        return local.where((z >= self.kth_largest(z, k)).flatten())

    def kth_largest(self, z: Tensor, k: int) -> Tensor:
        """Return the kth largest value [n, 1] of each token of z [n, m], over all shards of the latents."""
        z = z.detach()
        local_top = z.topk(min(k, z.shape[1]), dim=1).values
        if self.mesh.latent_parts > 1:
            # A shard may hold fewer than k candidates (dead latents); all_gather needs equal shapes.
            padded = functional.pad(local_top, (0, k - local_top.shape[1]), value=-torch.inf)
            local_top = self.mesh.latent_all_gather_columns(padded)
        return local_top.topk(k, dim=1).values[:, -1:]

    def reconstruction_loss(
        self, x: Tensor, target: Tensor, values: Tensor, active: Active, state: State, **terms: Tensor
    ) -> Loss:
        """Return the sum of FVU, AuxK loss and further terms, for activations of centred x."""
        error = target - self.reconstruct(values, active)
        fvu = self.fvu_of_error(error)
        auxiliary = self.config.auxiliary_weight * self.auxiliary(x, error, state.dead)
        parts = {"fvu": fvu, "auxiliary": auxiliary, **terms}
        if self.config.density_weight:
            parts["density"] = self.config.density_weight * self.density(values, active)
        loss = torch.stack(list(parts.values())).sum()
        detached = {name: part.detach() for name, part in parts.items()}
        return Loss(loss, detached, fvu.detach(), values.detach(), active)

    def density(self, values: Tensor, active: Active) -> Tensor:
        """Return the penalty of dense latents: the sum of activations, each weighted by how far its latent's share of
        the batch's tokens is above DENSE, relative to the sum of all activations.

        In a dictionary so small that the mean latent is half as dense as that, the limit is twice the mean.
        """
        fired = self.mesh.batch_all_reduce_mean(active.sum_over_tokens((values > 0).float()) / active.tokens)
        excess = (fired / max(fidelity.DENSE, 2 * self.config.k / self.config.latents) - 1).clamp(min=0)
        weighted = self.mesh.latent_all_reduce_sum((active.expand(excess.to(values)) * values).sum())
        total = self.mesh.latent_all_reduce_sum(values.detach().sum())
        # As in `auxiliary`: the mean of the ranks' penalties is then that of the whole batch.
        return weighted / self.mesh.batch_all_reduce_mean(total).clamp(min=1e-6)

    @torch.no_grad()
    def constrain(self) -> None:
        """Normalise decoder vectors after an optimiser step."""
        if self.unit:
            self.decoder.div_(torch.linalg.vector_norm(self.decoder, dim=1, keepdim=True))

    @torch.no_grad()
    def fold(self, scale: float, threshold: Tensor, **rest: Any) -> SAE:
        """Return the SAE of raw inputs. threshold [] or [F] is in units of the module's pre-activations.

        Decoder vectors keep unit norm, so an activation is the norm of the displacement that it explains.
        """
        bias = (self.bias - self.encoder @ self.centre) / scale
        thresholds = (threshold / scale).expand_as(bias).clone()
        weights = self.encoder.detach().clone(), bias, thresholds, self.decoder.detach().clone()
        return SAE(*weights, self.decoder_bias.detach() / scale, **rest)
