"""Text samples on which an SAE is evaluated, and the activations of its model on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import TOKENIZER_RULE, ContextRule, Document, Windows
from rudder.sae_models.activations.hooks import parse_site

WINDOW_LENGTH = 256
MAX_CHARACTERS_PER_TOKEN = 12


class ModelShape(NamedTuple):
    """Width of the residual stream, number of layers and context length of a model; None where it has no limit."""

    hidden_size: int
    layers: int
    context: int | None = None


@dataclass(frozen=True)
class TextSample:
    """A model truncated above the deepest site, its tokenizer, and documents cut into windows in random order."""

    trunk: Any
    tokenizer: Any
    documents: Sequence[Document]
    windows: Windows


def read_model_shape(model: Path) -> ModelShape:
    """Read a checkpoint's shape from its configuration. Raise FileNotFoundError if the folder is not a checkpoint."""
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"model: no config.json in {model}")
    config = AutoConfig.from_pretrained(model).get_text_config()
    return ModelShape(config.hidden_size, config.num_hidden_layers, getattr(config, "max_position_embeddings", None))


def load_text_sample(
    model: Path,
    sites: Sequence[str],
    corpus_path: Path,
    tokens: int,
    length: int = WINDOW_LENGTH,
    rule: ContextRule = TOKENIZER_RULE,
) -> TextSample:
    """Load a model and about `tokens` tokens of a corpus, in windows of `length` tokens. Raise ValueError if the model
    lacks a site, CorpusError if the corpus cannot be read.
    """
    parsed = [parse_site(site) for site in sites]
    documents = sample_documents(corpus.read(corpus_path), tokens)
    tokenizer = harvest.load_tokenizer(model)
    windows = corpus.windows(documents, tokenizer, length, rule).shuffled(0).first(tokens)
    return TextSample(harvest.load_trunk(model, *parsed), tokenizer, documents, windows)


def sample_documents(documents: Sequence[Document], tokens: int) -> list[Document]:
    """Return randomly chosen documents that hold at least `tokens` tokens, estimated from their length, so that the
    rest of the corpus is never tokenized.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    characters = torch.tensor([len(documents[index].text) for index in order]).cumsum(0)
    count = int((characters < tokens * MAX_CHARACTERS_PER_TOKEN).sum()) + 1
    return [documents[index] for index in order[:count]]


def site_activations(text: TextSample, sites: Sequence[str], windows: Windows) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield `harvest.text_activations` at sites given by name."""
    return harvest.text_activations(text.trunk, [parse_site(site) for site in sites], windows)


def sae_inputs(text: TextSample, sites: Sequence[str], windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `site_activations` in the shape that an SAE reads: [windows, length, d] for one site, [windows, length, L,
    d] for several.
    """
    for vectors, counted in site_activations(text, sites, windows):
        yield vectors[0] if len(sites) == 1 else torch.stack(vectors, dim=-2), counted


def sample_vectors(text: TextSample, sites: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """Return the vectors [n, d] at each site of the first `tokens` counted tokens."""
    windows = text.windows.first(tokens)
    total = len(windows.chunks(harvest.WINDOWS_PER_PASS))
    batches = tqdm(site_activations(text, sites, windows), total=total, unit="chunk", desc="figures")
    parts = [[x[counted] for x in vectors] for vectors, counted in batches]
    return {site: torch.cat([part[i] for part in parts])[:tokens] for i, site in enumerate(sites)}


def adjacent_sites(site: str, layers: int) -> list[str]:
    """Return the sites of the same hook point one layer below and one above, within a model of `layers` layers."""
    parsed = parse_site(site)
    return [f"layers.{n}.{parsed.point}" for n in (parsed.layer - 1, parsed.layer + 1) if 0 <= n < layers]
