"""Trainable SAEs, one file each. A new one is a file and a line here."""

from sae_models.architectures.architecture import Architecture
from sae_models.architectures.batch_topk import BatchTopK
from sae_models.architectures.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    "batch_topk": BatchTopK,
    "topk": TopK,
}
