"""The text an SAE is measured on, and what its model makes of it at the sites that are read and written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.activations.hooks import parse_site

LENGTH = 256
MOST_CHARACTERS_A_TOKEN = 12


class Shape(NamedTuple):
    """Of a model: the width of its residual stream, and how many layers it has."""

    hidden_size: int
    layers: int


@dataclass(frozen=True)
class Material:
    """A model up to the layers that are read, its tokenizer, and documents cut into windows in random order."""

    trunk: Any
    tokenizer: Any
    documents: Sequence[Document]
    windows: Windows


def shape_of(model: Path) -> Shape:
    """Of a checkpoint's folder, from its configuration. FileNotFoundError: not a checkpoint."""
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"model: no config.json in {model}")
    config = AutoConfig.from_pretrained(model).get_text_config()
    return Shape(config.hidden_size, config.num_hidden_layers)


def material(model: Path, sites: Sequence[str], text: Path, tokens: int) -> Material:
    """About `tokens` tokens of the text. ValueError: the model lacks a site; CorpusError: the file."""
    known = [parse_site(site) for site in sites]
    documents = some_of(corpus.read(text), tokens)
    tokenizer = harvest.load_tokenizer(model)
    windows = corpus.windows(documents, tokenizer, LENGTH).shuffled(0).first(tokens)
    return Material(harvest.load_trunk(model, *known), tokenizer, documents, windows)


def some_of(documents: Sequence[Document], tokens: int) -> list[Document]:
    """Documents in random order, as many as surely hold so many tokens, so that no more are cut than are read."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    held = torch.tensor([len(documents[place].text) for place in order]).cumsum(0)
    needed = int((held < tokens * MOST_CHARACTERS_A_TOKEN).sum()) + 1
    return [documents[place] for place in order[:needed]]


def passes(using: Material, sites: Sequence[str], windows: Windows) -> Iterator[tuple[list[Tensor], Tensor]]:
    """`harvest.text_activations` at sites by name."""
    return harvest.text_activations(using.trunk, [parse_site(site) for site in sites], windows)


def inputs(using: Material, sites: Sequence[str], windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """`passes` as an SAE reads them: [windows, length, d] of one site, [windows, length, L, d] of several."""
    for found, counted in passes(using, sites, windows):
        yield found[0] if len(sites) == 1 else torch.stack(found, dim=-2), counted


def sample(using: Material, sites: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """The first tokens [n, d] at each site."""
    chosen = using.windows.first(tokens)
    total = -(-len(chosen) // harvest.WINDOWS_A_PASS)
    seen = tqdm(passes(using, sites, chosen), total=total, unit="pass", desc="figures")
    parts = [[x[counted] for x in found] for found, counted in seen]
    return {site: torch.cat([part[i] for part in parts])[:tokens] for i, site in enumerate(sites)}


def neighbours(site: str, layers: int) -> list[str]:
    """The same point one layer down and one up, of a model of so many layers."""
    found = parse_site(site)
    return [f"layers.{n}.{found.point}" for n in (found.layer - 1, found.layer + 1) if 0 <= n < layers]
