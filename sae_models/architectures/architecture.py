"""What every trainable SAE has: weights and their beginning, unit decoder rows, the call of dead latents, folding."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rudder.sae_models.architectures import initial
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.collectives import ALONE, Mesh
from rudder.sae_models.sparse.operations import Active, Read, Weights

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Common:
    """Of every architecture. The defaults are those of TopK (arXiv 2406.04093); others say where theirs are from.

    latents F; k the mean number of active latents a token, kept or aimed at; precision of the encoder's product;
    encoder_norm, that of encoder rows at first, along the decoder's;
    offset, what decoder_bias begins as: `median` (geometric) or `mean`; auxiliary_k, how many dead latents a token are
    asked to explain the error (None: d / 2), at auxiliary_weight; learning_rate, beta1, beta2, epsilon of Adam;
    gradient_norm, to which the gradient is cut (None: it is not). TopK is published with beta1 = 0.9; without momentum,
    as JumpReLU and Gated are (arXiv 2407.14435, 2404.16014), it explains more with equal tokens and learning rate: FVU
    0.574 against 0.642 after 50 steps at 16,384 latents, 0.183 against 0.190 on a language model (one seed each).
    """

    latents: int
    k: int = 32
    precision: str = "bfloat16"
    encoder_norm: float = 1.0
    offset: str = "median"
    auxiliary_k: int | None = None
    auxiliary_weight: float = 1 / 32
    learning_rate: float | None = None
    beta1: float = 0.0
    beta2: float = 0.999
    epsilon: float = 6.25e-10
    gradient_norm: float | None = None

    @property
    def rate(self) -> float:
        """The learning rate: where none is set, 2e-4 / sqrt(F / 2^14)."""
        return self.learning_rate if self.learning_rate is not None else 2e-4 / (self.latents / 2**14) ** 0.5


class State(NamedTuple):
    """Where a run is: steps taken, their share of the run, and which latents [F] are dead."""

    step: int
    progress: float
    dead: Tensor


class Loss(NamedTuple):
    """Of one batch: what is minimised, its parts, the FVU, and the activations [m] or [n, F] at the active pairs."""

    total: Tensor
    parts: dict[str, Tensor]
    fvu: Tensor
    values: Tensor
    active: Active


class Architecture(nn.Module):
    """A trainable SAE: encoder [F, d], bias [F], decoder [F, d_out] of unit rows, decoder_bias [d_out].

    Inputs are scaled so that the mean of ||x||^2 is d. The encoder reads x - centre, a constant: as good as reading
    x - decoder_bias, and spares the product over all latents that the gradient of the bias would take.
    """

    config_type: ClassVar[type[Common]] = Common
    config: Common
    # Parameters and buffers that are not per latent: whole on every rank where latents are sharded.
    SHARED: ClassVar[frozenset[str]] = frozenset({"decoder_bias", "centre", "variance"})
    # Whether decoder rows are held at unit norm: the size of an activation must not hide in its direction.
    unit: ClassVar[bool] = True
    centre: Tensor
    variance: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.mesh: Mesh = ALONE
        directions = functional.normalize(torch.randn(config.latents, d, generator=generator), dim=1)
        self.encoder = nn.Parameter(config.encoder_norm * directions)
        self.bias = nn.Parameter(torch.zeros(config.latents))
        self.decoder = nn.Parameter(directions)
        self.decoder_bias = nn.Parameter(torch.zeros(d))
        self.register_buffer("centre", torch.zeros(d))
        self.register_buffer("variance", torch.ones(()))

    @property
    def weights(self) -> Weights:
        """What reads centred inputs."""
        return Weights(self.encoder, self.bias, PRECISIONS[self.config.precision])

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Sets centre, decoder bias and variance from scaled inputs [n, d] (`target`: a transcoder's outputs)."""
        del target
        self.centre.copy_(initial.OFFSETS[self.config.offset](sample))
        self.decoder_bias.copy_(self.centre)
        self.variance.copy_((sample - sample.mean(0)).square().sum(1).mean())

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Of scaled inputs [n, d] ([n, L, d] where layers are routed); `target`: outputs, or what a probe is taught."""
        raise NotImplementedError

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """The inference form for raw inputs, of which the module saw `scale` times their value; sample: such [n, d]."""
        raise NotImplementedError

    def reconstruct(self, values: Tensor, active: Active) -> Tensor:
        """The output [n, d_out] of activations at the active pairs."""
        return self.mesh.total(active.decode(values, self.decoder, self.unit)) + self.decoder_bias

    def unexplained(self, error: Tensor) -> Tensor:
        """The FVU of an error [n, d_out], against the variance of the sample the module began with."""
        return error.square().sum(1).mean() / self.variance

    def auxiliary(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Share of the error [n, d_out] that the strongest dead latents of centred x leave: it calls them back."""
        count = int(self.mesh.total(dead.sum()))
        if count == 0:
            return x.new_zeros(())
        k = min(self.config.auxiliary_k or x.shape[1] // 2, count)
        weights = Weights(self.encoder[dead], self.bias[dead], self.weights.precision)
        z, active = sparse.dense(self.mesh.spread(x), weights)
        explained = active.decode(torch.where(z >= self.least(z, k), z.relu(), 0.0), self.decoder[dead], self.unit)
        error = error.detach()
        # The mean of the ranks' losses is the share of the whole batch's error.
        return (error - self.mesh.total(explained)).square().sum() / self.mesh.mean(error.square().sum())

    def strongest(self, x: Tensor, k: int) -> Read:
        """The k largest pre-activations of each token of centred x, over all shards."""
        read = sparse.strongest(self.mesh.spread(x), self.weights, min(k, len(self.bias)))
        if self.mesh.latent_parts == 1:
            return read
        z = read.z.view(len(x), -1)
        return read.where((z >= self.least(z, k)).flatten())

    def least(self, z: Tensor, k: int) -> Tensor:
        """The kth largest [n, 1] of each token's z [n, m], among those of all shards."""
        z = z.detach()
        mine = z.topk(min(k, z.shape[1]), dim=1).values
        if self.mesh.latent_parts > 1:
            mine = self.mesh.gather(functional.pad(mine, (0, k - mine.shape[1]), value=-torch.inf))
        return mine.topk(k, dim=1).values[:, -1:]

    def loss_of(self, x: Tensor, target: Tensor, values: Tensor, active: Active, state: State, **terms: Tensor) -> Loss:
        """Reconstruction, the call of dead latents, and further terms, of activations of centred x."""
        error = target - self.reconstruct(values, active)
        fvu = self.unexplained(error)
        auxiliary = self.config.auxiliary_weight * self.auxiliary(x, error, state.dead)
        parts = {"fvu": fvu, "auxiliary": auxiliary, **terms}
        loss = torch.stack(list(parts.values())).sum()
        detached = {name: part.detach() for name, part in parts.items()}
        return Loss(loss, detached, fvu.detach(), values.detach(), active)

    @torch.no_grad()
    def constrain(self) -> None:
        """Back to unit decoder rows."""
        if self.unit:
            self.decoder.div_(torch.linalg.vector_norm(self.decoder, dim=1, keepdim=True))

    @torch.no_grad()
    def folded(self, scale: float, threshold: Tensor, **rest: Any) -> SAE:
        """The SAE of raw inputs; threshold [] or [F] of the module's own pre-activations.

        Decoder rows stay of unit norm, so an activation is the length of the displacement it explains.
        """
        bias = (self.bias - self.encoder @ self.centre) / scale
        thresholds = (threshold / scale).expand_as(bias).clone()
        weights = self.encoder.detach().clone(), bias, thresholds, self.decoder.detach().clone()
        return SAE(*weights, self.decoder_bias.detach() / scale, **rest)
