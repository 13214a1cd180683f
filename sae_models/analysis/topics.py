"""Topics that a user asks for, and the material on which rows are found and tried for them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml
from torch import Tensor

from rudder.sae_models.activations import corpus, harvest, samples
from rudder.sae_models.activations.corpus import HELD_OUT_FOLDS, TUNING_FOLDS, ContextRule, Document
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.analysis import candidates, judges, steering
from rudder.sae_models.analysis.candidates import Profile, Ranking
from rudder.sae_models.analysis.judges import Panel, Passages, Represent
from rudder.sae_models.analysis.sampling import Voice
from rudder.sae_models.analysis.steering import Room, Settings
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.concepts import Concept
from rudder.sae_models.errors import UserError

WINDOW = 256
CHARACTERS_PER_TOKEN = 5
TRAINING_PASSAGES, CALIBRATION_PASSAGES = 200, 100
SELECTION_FOLDS = tuple(fold for fold in range(corpus.FOLDS) if fold not in (*HELD_OUT_FOLDS, *TUNING_FOLDS))


class Topic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A topic, and one source of its rows; other `words` for it.

    `book`: a book of the corpus, against the others. `text`: a file of text about it, one passage a line, against the
    corpus. `label`: words of latents' labels. `pairs`: a file of JSON lines with texts `with` and `without` the topic.
    """

    name: str
    book: str = ""
    text: str = ""
    label: str = ""
    pairs: str = ""
    words: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The field that is set. UserError: none is, or several are."""
        given = [field for field in ("book", "text", "label", "pairs") if getattr(self, field)]
        if len(given) != 1:
            raise UserError(f"topic {self.name}: give one of book, text, label and pairs, not {len(given)}")
        return given[0]

    def describe(self) -> str:
        """Say how the rows were found."""
        return {
            "book": f"contrast: {self.book} against the other books",
            "text": f"contrast: {Path(self.text).name} against the corpus",
            "label": f"labels: {self.label}",
            "pairs": f"pairs: {Path(self.pairs).name}",
        }[self.source]


def read_topics(path: Path) -> list[Topic]:
    """Read topics from a YAML file. UserError: it is not a list of topics."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), list[Topic])
    except (UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise UserError(f"topics: {path}: {error}") from error


@dataclass(frozen=True)
class Material:
    """A bundle, its model to draw from (`voice`) and truncated at the site (`trunk`), a corpus, the readers of judges,
    and the panel of judges of the corpus's books.
    """

    bundle: Bundle
    voice: Voice
    trunk: Any
    documents: Sequence[Document]
    readers: Sequence[tuple[Represent, float]]
    panel: Panel
    windows_per_book: int

    def windows(self, documents: Sequence[Document]) -> corpus.Windows:
        """Cut documents into windows as the SAE was trained on them."""
        context = self.bundle.manifest.context
        rule = ContextRule(excluded_positions=context.excluded_positions, excluded_tokens=context.excluded_tokens)
        return corpus.windows(documents, self.voice.tokenizer, WINDOW, rule)


def load_material(bundle: Path, model: Path, judge: Path, corpus_path: Path, windows_per_book: int) -> Material:
    """Load what concepts are calibrated on. `judge`: the model whose token embeddings the second judge reads.

    BundleError: the bundle is damaged or of another model. CorpusError: the corpus cannot be read.
    """
    loaded = bundles.load(bundle)
    bundles.check_model(loaded, bundles.model_sha256(model), samples.read_model_shape(model).hidden_size)
    documents = corpus.read(corpus_path)
    context = loaded.manifest.context
    voice = Voice(harvest.load_model(model), harvest.load_tokenizer(model), context=context)
    trunk = harvest.load_trunk(model, parse_site(loaded.manifest.site))
    train = judges.passages_of(documents, SELECTION_FOLDS, TRAINING_PASSAGES, judges.TRAINING_WORDS)
    readers = readers_of(judge, train)
    panel = judges.fit_panel(readers, train, judges.passages_of(documents, TUNING_FOLDS, CALIBRATION_PASSAGES))
    return Material(loaded, voice, trunk, documents, readers, panel, windows_per_book)


def readers_of(judge: Path, train: Passages) -> list[tuple[Represent, float]]:
    """Return what the two judges read, with their penalties."""
    model, tokenizer = harvest.load_model(judge), harvest.load_tokenizer(judge)
    embeddings = judges.embedding_reader(model, tokenizer, train.texts)
    return [(judges.ngram_reader(train.texts), judges.NGRAM_PENALTY), (embeddings, judges.EMBEDDING_PENALTY)]


def profile_of(material: Material, topics: Sequence[Topic]) -> Profile:
    """Measure the profile of a sample of each book of the corpus, and of the texts of topics as books of their name."""
    documents = [*sampled(material.documents, material.windows_per_book * WINDOW * CHARACTERS_PER_TOKEN)]
    for topic in topics:
        if topic.source == "text":
            documents += [Document(topic.name, str(n), text) for n, text in enumerate(lines_of(topic.text))]
    windows = material.windows(documents).shuffled(0)
    return candidates.profile_of(material.trunk, material.bundle, windows, documents)


def sampled(documents: Sequence[Document], characters: int) -> Iterator[Document]:
    """Yield random documents of the folds for selection, of each book until they have so many characters."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    taken: dict[str, int] = {}
    for document in (documents[index] for index in order):
        if document.fold in SELECTION_FOLDS and taken.get(document.book, 0) < characters:
            part = document.text[: characters - taken.get(document.book, 0)]
            taken[document.book] = taken.get(document.book, 0) + len(part)
            yield Document(document.book, document.module, part)


def lines_of(path: str) -> list[str]:
    """Return the lines of a file that are not blank. UserError: there is none."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"text: {path} is empty")
    return lines


def pairs_of(path: str) -> tuple[list[str], list[str]]:
    """Return the texts with and without a topic. UserError: a line is not such a pair."""
    lines = lines_of(path)
    try:
        records = [json.loads(line) for line in lines]
        return [str(record["with"]) for record in records], [str(record["without"]) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"pairs: {path}: a line is not an object with `with` and `without`") from error


def ranking_of(material: Material, topic: Topic, profile: Profile) -> Ranking:
    """Rank the latents that stand for a topic. UserError: the corpus has no such book."""
    match topic.source:
        case "label":
            return candidates.by_label(material.bundle, topic.label)
        case "pairs":
            return candidates.by_pairs(*(largest(material, texts) for texts in pairs_of(topic.pairs)))
    book = topic.book or topic.name
    if book not in profile.books:
        raise UserError(f"topic {topic.name}: the corpus has no book {book!r}: {', '.join(profile.books)}")
    return candidates.by_contrast(profile, book)


def largest(material: Material, texts: Sequence[str]) -> Tensor:
    """Return the largest activation of each latent in each text, [texts, F]."""
    windows = material.windows([Document("", str(number), text) for number, text in enumerate(texts)])
    return candidates.largest_activations(material.trunk, material.bundle, windows, len(texts))


def panel_of(material: Material, topic: Topic) -> tuple[Panel, str]:
    """Return judges of a topic, and its name among their topics: of a book those of the corpus, else those fitted to
    texts on the topic against the corpus.
    """
    if topic.source == "book":
        return material.panel, topic.book
    texts = on_topic(material, topic)
    train = against(texts[::2], material, SELECTION_FOLDS)
    held_out = against(texts[1::2], material, TUNING_FOLDS)
    return judges.fit_panel(material.readers, train, held_out), "topic"


def on_topic(material: Material, topic: Topic) -> list[str]:
    """Return texts on a topic: those that it gives, or passages of the corpus with the words of the label."""
    if topic.source == "text":
        found = [passage for line in lines_of(topic.text) for passage in judges.cut(line)]
    elif topic.source == "pairs":
        found = pairs_of(topic.pairs)[0]
    else:
        words = set(judges.words_of(topic.label))
        every = (text for document in material.documents for text in judges.cut(document.text))
        found = [text for text in every if words & set(judges.words_of(text))][: 4 * TRAINING_PASSAGES]
    if len(found) < 2:
        raise UserError(f"topic {topic.name}: has {len(found)} passages to judge it by, needs 2")
    return found


def against(texts: Sequence[str], material: Material, folds: Sequence[int]) -> Passages:
    """Label texts on a topic 1, and others of the corpus 0."""
    others = judges.passages_of(material.documents, folds, 40).texts
    rest = [text for text in others if text not in set(texts)]
    label = torch.tensor([1] * len(texts) + [0] * len(rest))
    return Passages([*texts, *rest], label, ("other", "topic"))


def calibrate(material: Material, room: Room, profile: Profile, topic: Topic, settings: Settings) -> Concept:
    """Calibrate a topic: rank latents, score them, try groups of them. UserError: nothing stands for it."""
    ranking = ranking_of(material, topic, profile)
    if not ranking.latents:
        raise UserError(f"topic {topic.name}: no latent of {material.bundle.manifest.name} stands for it")
    panel, name = panel_of(material, topic)
    scores = candidates.scores_of(material.voice, material.bundle, ranking.latents)
    found = steering.calibrate(
        room, lambda texts: panel.response(texts, name), material.bundle, ranking, scores, settings
    )
    return Concept(topic.name, topic.describe(), found, topic.words)
