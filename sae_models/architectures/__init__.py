"""Trainable SAE architectures, one module each. To add one, add a module and an entry to ARCHITECTURES."""

from rudder.sae_models.architectures.adaptive_k import AdaptiveK
from rudder.sae_models.architectures.architecture import Architecture
from rudder.sae_models.architectures.batch_topk import BatchTopK
from rudder.sae_models.architectures.gated import Gated
from rudder.sae_models.architectures.jumprelu import JumpReLU
from rudder.sae_models.architectures.matryoshka import Matryoshka
from rudder.sae_models.architectures.relu import ReLU
from rudder.sae_models.architectures.route import Route
from rudder.sae_models.architectures.topk import TopK
from rudder.sae_models.architectures.transcoder import Transcoder

ARCHITECTURES: dict[str, type[Architecture]] = {
    "adaptive_k": AdaptiveK,
    "batch_topk": BatchTopK,
    "gated": Gated,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
    "relu": ReLU,
    "route": Route,
    "topk": TopK,
    "transcoder": Transcoder,
}
