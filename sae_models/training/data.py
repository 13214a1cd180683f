"""What a run is made from: a corpus cut into windows, a model, and the activations that it gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.activations import corpus, harvest, images, store
from rudder.sae_models.activations.corpus import CorpusError, Document, Windows
from rudder.sae_models.activations.hooks import Site, parse_site
from rudder.sae_models.activations.store import StoreError
from rudder.sae_models.activations.stream import Labelled, Live, Part, Source, Vectors
from rudder.sae_models.bundle import bundle
from rudder.sae_models.sparse.collectives import Mesh
from rudder.sae_models.training import complexity
from rudder.sae_models.training.config import Config, ConfigError, Trained, trained


@dataclass(frozen=True)
class Text:
    """Documents, and their windows in two parts."""

    documents: list[Document]
    tokenizer: Any
    train: Windows
    held_out: Windows


@dataclass(frozen=True)
class TrainingData(Text):
    """The model beside it, cut off above the deepest of the sites."""

    trunk: Any
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Given:
    """Vectors to train on and to measure with, the model they are of, and the text they are of, if there is one."""

    train: Source
    held_out: Source
    model: str
    model_sha256: str
    text: TrainingData | None = None


def device_of(config: Config) -> torch.device:
    """Where a run computes."""
    return torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def gather(config: Config) -> Given:
    """Reads what a run is given. ValueError, CorpusError, StoreError or OSError names what is wrong with it."""
    if config.vectors:
        return kept(config, Path(config.vectors))
    folder, sites = Path(config.model), sites_of(config)
    trunk = harvest.load_trunk(folder, *sites, device=device_of(config))
    model = folder.resolve().name, bundle.model_sha256(folder)
    if config.images and adaptive(config):
        raise ConfigError("sae.architecture", "adaptive_k is taught the complexity of text, which images do not have")
    if config.images:
        return Given(*images.read(Path(config.images), folder, trunk, sites, config.seed), *model)
    text = read(config)
    made = TrainingData(text.documents, text.tokenizer, text.train, text.held_out, trunk, sites)
    live, held = (Live(trunk, sites, windows) for windows in (text.train, text.held_out))
    return Given(labelled(config, text, live), held, *model, made)


def kept(config: Config, folder: Path) -> Given:
    """A store that is there; its last tenth is held out. StoreError: it lacks a site, or holds too little."""
    found = store.load(folder)
    content = found.manifest.content
    for site in held_by(config):
        if site not in content.sites:
            raise StoreError(f"store: {found.path} does not hold {site}, but {', '.join(content.sites)}")
    chunks = range(len(found.sizes))
    first = len(chunks) - max(1, len(chunks) // 10)
    if first == 0:
        raise StoreError(f"store: {found.path}: {found.tokens} vectors are too few to hold some out")
    return Given(Part(found, chunks[:first]), Part(found, chunks[first:]), content.model, content.model_sha256)


def sites_of(config: Config) -> tuple[Site, ...]:
    """All sites that the SAEs of a run read or write."""
    return tuple(map(parse_site, dict.fromkeys(site for spec in trained(config) for site in spec.all_sites)))


def read(config: Config) -> Text:
    """Reads the corpus."""
    tokenizer = harvest.load_tokenizer(Path(config.model))
    documents = corpus.read(Path(config.corpus or ""))
    windows = corpus.windows(documents, tokenizer, config.window)
    return Text(documents, tokenizer, *split(windows, documents, config.seed))


def split(windows: Windows, documents: list[Document], seed: int) -> tuple[Windows, Windows]:
    """Training and held-out windows, shuffled; whole documents fall on one side."""
    held = corpus.in_folds(windows, documents, corpus.HELD_OUT_FOLDS)
    if held.all() or not held.any():
        raise CorpusError(f"corpus: {len(documents)} documents are too few to hold some out")
    return windows.where(~held).shuffled(seed), windows.where(held).shuffled(seed)


def source_of(config: Config, made: Given, mesh: Mesh) -> Source:
    """What is trained on: out of a store, which is harvested first, or on the fly."""
    if config.data.store is None:
        return made.train
    folder = Path(config.data.store)
    if mesh.leads:
        store.write(folder, content_of(config, made.train), made.train)
    mesh.barrier()
    return store.load(folder)


def labelled(config: Config, text: Text, source: Source) -> Source:
    """The source, with the complexity of each token's window as each AdaptiveK of the run asks for it."""
    for spec in {complexity.label(spec.settings): spec for spec in adaptive(config)}.values():
        rate = complexity.COMPLEXITIES[spec.settings.complexity]
        rates = rate(text.documents, text.train, Path(config.model), device_of(config))
        source = Labelled(source, text.train, complexity.label(spec.settings), rates)
    return source


def adaptive(config: Config) -> list[Trained]:
    """The SAEs of a run that are taught complexities."""
    return [spec for spec in trained(config) if spec.architecture == "adaptive_k"]


def held_by(config: Config) -> tuple[str, ...]:
    """The names of all that the SAEs of a run are given."""
    labels = (complexity.label(spec.settings) for spec in adaptive(config))
    return tuple(dict.fromkeys([*map(str, sites_of(config)), *labels]))


def content_of(config: Config, source: Source) -> store.Content:
    """What the run's store must hold of a source."""
    held = sum(source.sizes)
    return store.Content(
        model=Path(config.model).resolve().name,
        model_sha256=bundle.model_sha256(Path(config.model)),
        corpus_sha256=corpus.sha256(Path(config.corpus or config.images or "")),
        sites=held_by(config),
        window=config.window,
        seed=config.seed,
        tokens=min(config.data.tokens or held, held),
        precision=config.data.precision,
    )


def sample_of(source: Source, tokens: int) -> Vectors:
    """The first vectors of a source, at least so many where it has them."""
    count, held = 0, 0
    while held < tokens and count < len(source.sizes):
        held += source.sizes[count]
        count += 1
    parts = [source.load([chunk]) for chunk in tqdm(range(count), desc="sample", unit="chunk")]
    return {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}


def inputs(spec: Trained, vectors: Vectors) -> Tensor:
    """What an SAE reads: [n, d], or [n, L, d] of L sites."""
    found = [vectors[site] for site in spec.sites]
    return found[0] if len(found) == 1 else torch.stack(found, 1)


def target(spec: Trained, vectors: Vectors) -> Tensor | None:
    """What a step is given beside its inputs: a transcoder's outputs [n, d_out], complexities [n] of AdaptiveK."""
    if spec.architecture == "adaptive_k":
        return vectors[complexity.label(spec.settings)][:, 0]
    return explained(spec, vectors)


def explained(spec: Trained, vectors: Vectors) -> Tensor | None:
    """What an SAE's output is to be near [n, d_out], where that is not its input."""
    return vectors[spec.output_site] if spec.output_site else None
