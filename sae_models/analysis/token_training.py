"""Train token models (token_model.py) by the streaming loss of probes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rudder.sae_models.analysis.probe_training import Sample, TrainingSettings, fit
from rudder.sae_models.token_model import TokenModel, buckets

BUCKETS = 1 << 16
ORDER = 3
# Nearly all n-grams are rare: each has few steps to learn from.
SETTINGS = TrainingSettings(epochs=8, learning_rate=2e-2, weight_decay=1e-2)


def fit_tokens(
    texts: Sequence[Sequence[int]],
    label: Tensor,
    weight: Tensor,
    vocabulary: str,
    count: int = BUCKETS,
    order: int = ORDER,
    settings: TrainingSettings = SETTINGS,
) -> TokenModel:
    """Train a model on the counted tokens of exchanges with labels [n], each with a weight [n] in the loss.

    vocabulary: `vocabulary_sha256` of the tokenizer. count: number of buckets. order: tokens of the longest n-gram.
    """
    weights, bias = torch.zeros(count, requires_grad=True), torch.zeros((), requires_grad=True)
    grams = [torch.tensor(buckets(ids, order, count)) for ids in texts]
    hashed = Sample(grams, label, weight)
    fit(lambda g: (weights[g].sum(-1) + bias)[None], [weights, bias], hashed, settings)
    return TokenModel(weights.detach().numpy(), float(bias.detach()), order, vocabulary)
