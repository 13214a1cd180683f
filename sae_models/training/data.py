"""Inputs of a run: a corpus cut into windows, a model, and the activations of the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.activations import corpus, harvest, images, norms, store, stream
from rudder.sae_models.activations.corpus import ContextRule, CorpusError, Document, Windows
from rudder.sae_models.activations.hooks import Site, parse_site
from rudder.sae_models.activations.store import Store, StoreError
from rudder.sae_models.activations.stream import LabelledSource, SourceSubset, TextSource, Vectors, VectorSource
from rudder.sae_models.bundle import bundle
from rudder.sae_models.bundle.manifest import Context
from rudder.sae_models.sparse.collectives import Mesh
from rudder.sae_models.training import complexity
from rudder.sae_models.training.config import Config, ConfigError, SAESpec, sae_specs

# Folder of the held-out part, within the store.
HELD_OUT = "held-out"


@dataclass(frozen=True)
class TextWindows:
    """Documents, and their training and held-out windows."""

    documents: list[Document]
    tokenizer: Any
    train: Windows
    held_out: Windows


@dataclass(frozen=True)
class TrainingText(TextWindows):
    """Text with the model that reads it, truncated above the deepest of the sites."""

    trunk: Any
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class TrainingInputs:
    """Training and held-out vectors, the model that they come from and, if they come from text, that text."""

    train: VectorSource
    held_out: VectorSource
    model: str
    model_sha256: str
    text: TrainingText | None = None


def device_of(config: Config) -> torch.device:
    """Return the device of a run."""
    return torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def load_inputs(config: Config) -> TrainingInputs:
    """Load the inputs of a run. Raise ValueError, CorpusError, StoreError or OSError if something is missing or
    damaged.
    """
    if config.vectors:
        return load_stored_inputs(config, Path(config.vectors))
    folder, sites = Path(config.model), run_sites(config)
    trunk = harvest.load_trunk(folder, *sites, device=device_of(config))
    model = model_of(config)
    if config.images and adaptive_k_specs(config):
        raise ConfigError(
            "sae.architecture", "adaptive_k is trained on the complexity of text, which images do not have"
        )
    if config.images:
        return TrainingInputs(*images.read(Path(config.images), folder, trunk, sites, config.seed), *model)
    text = load_windows(config)
    training_text = TrainingText(text.documents, text.tokenizer, text.train, text.held_out, trunk, sites)
    source = TextSource(trunk, sites, text.train)
    held_out = TextSource(trunk, sites, text.held_out.first(config.evaluation.tokens))
    return TrainingInputs(with_complexities(config, text, source), held_out, *model, training_text)


def model_of(config: Config) -> tuple[str, str]:
    """Return the name and the SHA-256 of a run's model."""
    folder = Path(config.model)
    return folder.resolve().name, bundle.model_sha256(folder)


def load_stored_inputs(config: Config, folder: Path) -> TrainingInputs:
    """Load an existing store; its last tenth is held out. Raise StoreError if it lacks a site or holds too
    few vectors.
    """
    stored = store.load(folder)
    content = stored.manifest.content
    for site in source_names(config):
        if site not in content.sites:
            raise StoreError(f"store: {stored.path} does not hold {site}, but {', '.join(content.sites)}")
    chunks = range(len(stored.chunk_sizes))
    first = len(chunks) - max(1, len(chunks) // 10)
    if first == 0:
        raise StoreError(f"store: {stored.path}: {stored.tokens} vectors are too few to hold some out")
    return TrainingInputs(
        SourceSubset(stored, chunks[:first]), SourceSubset(stored, chunks[first:]), content.model, content.model_sha256
    )


def run_sites(config: Config) -> tuple[Site, ...]:
    """Return all sites that the SAEs of a run read or write."""
    return tuple(map(parse_site, dict.fromkeys(site for spec in sae_specs(config) for site in spec.all_sites)))


def load_windows(config: Config) -> TextWindows:
    """Read the corpus and cut it into windows."""
    tokenizer = harvest.load_tokenizer(Path(config.model))
    documents = corpus.read(Path(config.corpus or ""))
    if config.chats:
        documents += corpus.read(Path(config.chats))
    windows = corpus.windows(documents, tokenizer, config.window, context_rule(config, tokenizer))
    train, held_out = split(windows, documents, config.seed)
    if config.chats:
        train, held_out = (with_chats_spread(part, documents, config.chat_share) for part in (train, held_out))
    return TextWindows(documents, tokenizer, train, held_out)


def with_chats_spread(windows: Windows, documents: Sequence[Document], share: float) -> Windows:
    """Order windows so that chats are `share` of the counted tokens of every prefix, until there are no more chats.

    Chats and other windows keep their order. A prefix is then the same however many tokens a run takes.
    """
    is_chat = torch.tensor([bool(document.messages) for document in documents])[windows.document]
    tokens = windows.counted.sum(1)
    chats, others = tokens.where(is_chat, 0).cumsum(0) / share, tokens.where(~is_chat, 0).cumsum(0) / (1 - share)
    return windows.take(chats.where(is_chat, others).argsort(stable=True))


def context_rule(config: Config, tokenizer: Any) -> ContextRule:
    """Return the rule by which a run cuts text into contexts."""
    special = tokenizer.all_special_ids if config.exclude_special_tokens else ()
    return ContextRule(config.prepend_bos, config.excluded_positions, tuple(sorted(set(special))))


def context_of(config: Config, text: TextWindows) -> Context:
    """Return what the manifest says of the contexts of a run. A leading BOS, which is never counted, is excluded."""
    rule = context_rule(config, text.tokenizer)
    bos = corpus.leading_token(text.tokenizer, rule) is not None
    positions = tuple(sorted({*rule.excluded_positions, *([0] if bos else [])}))
    return Context(config.window, bos, positions, rule.excluded_tokens)


def split(windows: Windows, documents: list[Document], seed: int) -> tuple[Windows, Windows]:
    """Split into training and held-out windows, shuffled; all windows of a document fall on the same side."""
    is_held_out = corpus.in_folds(windows, documents, corpus.HELD_OUT_FOLDS)
    if is_held_out.all() or not is_held_out.any():
        raise CorpusError(f"corpus: {len(documents)} documents are too few to hold some out")
    return windows.where(~is_held_out).shuffled(seed), windows.where(is_held_out).shuffled(seed)


def with_store(config: Config, inputs: TrainingInputs, mesh: Mesh) -> TrainingInputs:
    """Return inputs that are read from the run's store, which the leader harvests first; without a store, the same."""
    if config.data.store is None:
        return inputs
    if mesh.is_leader:
        harvest_stores(config, inputs)
    mesh.barrier()
    train, held_out = harvest_stores(config, inputs)
    return replace(inputs, train=train, held_out=held_out)


def harvest_stores(config: Config, inputs: TrainingInputs) -> tuple[Store, Store]:
    """Write the training and the held-out part of the run's store, as far as they are not there."""
    folder = Path(config.data.store or "")
    # The smaller part first: training may begin before the other is complete.
    held_out = store.write(folder / HELD_OUT, store_content(config, inputs.held_out, "held out"), inputs.held_out)
    return store.write(folder, store_content(config, inputs.train), inputs.train), held_out


def text_vectors(inputs: TrainingInputs, source: VectorSource, windows: Windows) -> Iterator[tuple[Vectors, Tensor]]:
    """Yield, chunk by chunk, the vectors [windows, length, d] at each site, and the mask of counted positions.

    `windows`: the first ones of the source, the training or the held-out one. A store saves running the model.
    """
    assert inputs.text is not None
    sites = [str(site) for site in inputs.text.sites]
    if isinstance(source, Store):
        chunks = stream.by_window(source, sites, windows)
    else:
        chunks = harvest.text_activations(inputs.text.trunk, inputs.text.sites, windows)
    for vectors, counted in chunks:
        yield dict(zip(sites, vectors, strict=True)), counted


def with_complexities(config: Config, text: TextWindows, source: VectorSource) -> VectorSource:
    """Add to the source, for each AdaptiveK of the run, the complexity of the window of each token."""
    for spec in {complexity.source_name(spec.settings): spec for spec in adaptive_k_specs(config)}.values():
        rate_windows = complexity.COMPLEXITIES[spec.settings.complexity]
        complexities = rate_windows(text.documents, text.train, Path(config.model), device_of(config))
        source = LabelledSource(source, text.train, complexity.source_name(spec.settings), complexities)
    return source


def adaptive_k_specs(config: Config) -> list[SAESpec]:
    """Return the AdaptiveK SAEs of a run."""
    return [spec for spec in sae_specs(config) if spec.architecture == "adaptive_k"]


def source_names(config: Config) -> tuple[str, ...]:
    """Return the names of everything that the source of a run must hold: sites and complexities."""
    labels = (complexity.source_name(spec.settings) for spec in adaptive_k_specs(config))
    return tuple(dict.fromkeys([*map(str, run_sites(config)), *labels]))


def store_content(config: Config, source: VectorSource, part: store.Part = "training") -> store.Content:
    """Return the content that a part of the run's store must have for a source."""
    (name, digest), available = model_of(config), sum(source.chunk_sizes)
    limit = config.data.tokens if part == "training" else config.evaluation.tokens
    return store.Content(
        model=name,
        model_sha256=digest,
        corpus_sha256=corpus.sha256(Path(config.corpus or config.images or "")),
        sites=source_names(config) if part == "training" else tuple(map(str, run_sites(config))),
        window=config.window,
        seed=config.seed,
        tokens=min(limit or available, available),
        precision=config.data.precision,
        prepend_bos=config.prepend_bos,
        excluded_positions=config.excluded_positions,
        exclude_special_tokens=config.exclude_special_tokens,
        chats_sha256=corpus.sha256(Path(config.chats)) if config.chats else "",
        chat_share=config.chat_share if config.chats else 0.0,
        part=part,
    )


class VectorSample(NamedTuple):
    """Vectors without attention sinks, and the share of the tokens that the sinks were."""

    vectors: Vectors
    outlier_share: float


def sample_vectors(source: VectorSource, tokens: int) -> Vectors:
    """Return the vectors of `sample`."""
    return sample(source, tokens).vectors


def sample(source: VectorSource, tokens: int) -> VectorSample:
    """Sample the first vectors of a source, at least `tokens` of them, sinks included, if it has as many."""
    count, size = 0, 0
    while size < tokens and count < len(source.chunk_sizes):
        size += source.chunk_sizes[count]
        count += 1
    parts = [source.load([chunk]) for chunk in tqdm(range(count), desc="sample", unit="chunk")]
    vectors = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
    return VectorSample(*norms.without_outliers(vectors))


def sae_inputs(spec: SAESpec, vectors: Vectors) -> Tensor:
    """Return the inputs of an SAE: [..., d], or [..., L, d] for L sites."""
    parts = [vectors[site] for site in spec.sites]
    return parts[0] if len(parts) == 1 else torch.stack(parts, -2)


def target(spec: SAESpec, vectors: Vectors) -> Tensor | None:
    """Return the `target` of a training step: outputs [n, d_out] of a transcoder, complexities [n] of AdaptiveK, else
    None.
    """
    if spec.architecture == "adaptive_k":
        return vectors[complexity.source_name(spec.settings)][:, 0]
    return reconstruction_target(spec, vectors)


def reconstruction_target(spec: SAESpec, vectors: Vectors) -> Tensor | None:
    """Return the vectors [n, d_out] that the SAE output approximates if they are not its inputs, else None."""
    return vectors[spec.output_site] if spec.output_site else None
