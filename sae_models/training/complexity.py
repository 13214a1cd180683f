"""How complex the text of each window is, from 0 to 10: what AdaptiveK's probe is taught."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.corpus import CorpusError, Document, Windows
from rudder.sae_models.errors import UserError
from rudder.sae_models.evaluation import splicing as metrics

MOST = 10.0
# Between these shares of all windows losses are spread over the scale; what is beyond them is at its ends.
ENDS = (0.01, 0.99)


def rated(documents: list[Document], windows: Windows, model: Path, device: torch.device) -> Tensor:
    """As the corpus says [n]: the authors of arXiv 2508.17320 had a language model rate each text.

    CorpusError: it does not say.
    """
    del model, device
    known = [document.complexity for document in documents]
    if any(value is None for value in known):
        given = sum(value is not None for value in known)
        raise CorpusError(
            f"corpus: {given} of {len(known)} documents have a `complexity` from 0 to 10, which adaptive_k is taught; "
            "add it to each row, or set sae.complexity to loss"
        )
    return torch.tensor(known, dtype=torch.float32)[windows.document]


def surprising(documents: list[Document], windows: Windows, model: Path, device: torch.device) -> Tensor:
    """By the model's own mean loss on each window [n]; our own, not the paper's. ValueError: it predicts no token."""
    del documents
    whole = harvest.load_model(model, device)
    if not harvest.speaks(whole.config):
        raise UserError(f"sae.complexity: loss needs a causal language model, {model} is none")
    nats, count = metrics.losses(whole, windows).unbind(1)
    loss = nats / count.clamp(min=1)
    low, high = torch.quantile(loss, torch.tensor(ENDS))
    rates: Tensor = ((loss - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) * MOST
    return rates


COMPLEXITIES: Mapping[str, Callable[[list[Document], Windows, Path, torch.device], Tensor]] = {
    "corpus": rated,
    "loss": surprising,
}


def label(settings: Any) -> str:
    """The name under which a source holds the complexities that an AdaptiveK's configuration asks for."""
    return f"complexity.{settings.complexity}"
