"""Labelled exchanges, as the tokens that a server would run: what guards are trained, calibrated and measured on."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.corpus import ContextRule, Document, Windows, counted_positions, leading_token
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.errors import UserError
from rudder.sae_models.tokens import text_encoder

TRAIN, TUNE, REPORT = "train", "tune", "report"
SPLITS = (TRAIN, TUNE, REPORT)
# Folds of a corpus's documents. The report is larger than that of other studies, to certify rates near 1 %.
REPORT_FOLDS, TUNE_FOLDS = range(6), range(6, 10)
# Texts are cut before they are tokenised, so that the rest of a long section costs nothing.
MAX_CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class Exchange:
    """A text as the tokens that the model runs, BOS included.

    label: probability that it is to be noticed. group: its book, or the source of a prompt. cluster: the section that
    it is from, of which exchanges are not independent.
    """

    ids: tuple[int, ...]
    label: float
    group: str
    cluster: str
    split: str


def check_topic(topic: Topic, documents: Sequence[Document]) -> None:
    """Raise UserError if a book of the topic is not in the corpus, or is a neighbour too."""
    known = {document.book for document in documents}
    for field, books in (("topic", topic.books), ("neighbour", topic.neighbours)):
        if unknown := [book for book in books if book not in known]:
            raise UserError(f"{field}: the corpus has no book {unknown[0]}; it has {', '.join(sorted(known))}")
    if both := set(topic.books) & set(topic.neighbours):
        raise UserError(f"neighbour: {min(both)} is the topic")


def split_of(document: Document) -> str:
    """Return the split of a section, by its fold."""
    return REPORT if document.fold in REPORT_FOLDS else TUNE if document.fold in TUNE_FOLDS else TRAIN


def of_corpus(
    documents: Sequence[Document],
    tokenizer: Any,
    topic: Topic,
    split: str,
    tokens: int,
    limits: Mapping[str, int],
    per_section: int = 1,
) -> list[Exchange]:
    """Return exchanges of up to `tokens` tokens, without BOS, from the sections of a split.

    limits: the most exchanges of each book; sections take turns in random order. per_section: the most of one section,
    from its beginning on, one behind the other.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    chosen, remaining = list[Exchange](), dict(limits)
    for document in (documents[i] for i in order if split_of(documents[i]) == split):
        count = min(per_section, remaining.get(document.book, 0))
        pieces = _pieces(document, tokenizer, tokens, count)
        remaining[document.book] = remaining.get(document.book, 0) - len(pieces)
        label, cluster = float(document.book in topic.books), f"{document.book}/{document.module}"
        chosen += [Exchange(ids, label, document.book, cluster, split) for ids in pieces]
    return chosen


def _pieces(document: Document, tokenizer: Any, tokens: int, count: int) -> list[tuple[int, ...]]:
    """Return up to `count` pieces of a document; only the first may be shorter than `tokens`."""
    if not count:
        return []
    lead = leading_token(tokenizer)
    ids = text_encoder(tokenizer).encode(document.text[: count * tokens * MAX_CHARACTERS_PER_TOKEN])
    pieces = [ids[start : start + tokens] for start in range(0, min(len(ids), count * tokens), tokens)]
    kept = pieces[:1] + [piece for piece in pieces[1:] if len(piece) == tokens]
    return [(*(() if lead is None else (lead,)), *piece) for piece in kept if piece]


@dataclass(frozen=True)
class Prompt:
    """A labelled prompt; `number`: its line in the file."""

    text: str
    label: float
    split: str
    source: str
    number: int


def read_prompts(path: Path) -> list[Prompt]:
    """Read labelled prompts: JSON lines of `text`, `harmful` or `label`, and optionally `split` and `source`.

    Without `split`, one in five is for tuning, one in five for the report. Raise UserError by line and field.
    """
    return [_prompt(record, path, number) for number, record in enumerate(corpus.json_records(path), 1)]


def of_prompts(prompts: Sequence[Prompt], tokenizer: Any, chat: bool = True) -> list[Exchange]:
    """Return prompts as exchanges; `chat`: as the message of a user in the chat template, up to where answers begin."""
    encoder, chosen = text_encoder(tokenizer), []
    for prompt in tqdm(prompts, desc="tokenise", unit="prompt"):
        messages = [{"role": "user", "content": prompt.text}]
        ids = encoder.encode_chat(messages, add_generation_prompt=True) if chat else encoder.encode_prompt(prompt.text)
        chosen.append(Exchange(tuple(ids), prompt.label, prompt.source, str(prompt.number), prompt.split))
    return chosen


def _prompt(record: Any, path: Path, number: int) -> Prompt:
    where = f"prompts: {path}: line {number}"
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
        raise UserError(f"{where}: text: must be a string that is not empty")
    label = record.get("harmful", record.get("label"))
    if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
        raise UserError(f"{where}: harmful or label: must be true, false or a number from 0 to 1")
    split = record.get("split", (TUNE, REPORT, TRAIN, TRAIN, TRAIN)[number % 5])
    if split not in SPLITS:
        raise UserError(f"{where}: split: {split!r} is none of {', '.join(SPLITS)}")
    return Prompt(record["text"], float(label), split, str(record.get("source", "")), number)


def padded(
    excerpts: Sequence[Exchange], paddings: Sequence[Exchange], before: int, after: int, tokenizer: Any
) -> list[Exchange]:
    """Return excerpts between tokens of other exchanges, `before` and `after` each; BOS stays in front.

    paddings: exchanges of at least `before + after` tokens besides BOS, one of which is drawn for each excerpt, not of
    the same section.
    """
    generator = random.Random(0)
    return [
        _padded(excerpt, generator.choice([p for p in paddings if p.cluster != excerpt.cluster]), before, after, lead)
        for lead in [int(leading_token(tokenizer) is not None)]
        for excerpt in excerpts
    ]


def _padded(excerpt: Exchange, padding: Exchange, before: int, after: int, lead: int) -> Exchange:
    front, rest = padding.ids[: lead + before], padding.ids[lead + before : lead + before + after]
    return replace(excerpt, ids=(*front, *excerpt.ids[lead:], *rest))


def behind_benign(exchanges: Sequence[Exchange], longest: int, tokenizer: Any) -> list[Exchange]:
    """Return exchanges of which every second stands behind benign text, of random length, `longest` tokens in all.

    A probe that has read nothing but the beginnings of contexts misses what comes later in one (arXiv 2601.11516).
    """
    generator, lead = random.Random(0), int(leading_token(tokenizer) is not None)
    benign = [exchange for exchange in exchanges if exchange.label <= 0.5]
    return [
        _behind(exchange, benign, longest, lead, generator) if number % 2 and benign else exchange
        for number, exchange in enumerate(exchanges)
    ]


def _behind(
    exchange: Exchange, benign: Sequence[Exchange], longest: int, lead: int, generator: random.Random
) -> Exchange:
    before, room = list[int](), generator.randint(0, max(0, longest + lead - len(exchange.ids)))
    while len(before) < room:
        before += generator.choice(benign).ids[lead:]
    return replace(exchange, ids=(*exchange.ids[:lead], *before[:room], *exchange.ids[lead:]))


def excerpt_of(exchange: Exchange, tokens: int) -> Exchange:
    """Return the first tokens of an exchange, BOS among them."""
    return replace(exchange, ids=exchange.ids[:tokens])


def as_windows(exchanges: Sequence[Exchange], tokenizer: Any, rule: ContextRule) -> Windows:
    """Return exchanges as the windows of a forward pass, with the positions that a server counts: not BOS in front."""
    lead, pad = leading_token(tokenizer), tokenizer.eos_token_id or 0
    size = torch.tensor([len(exchange.ids) for exchange in exchanges])
    tokens = torch.full((len(exchanges), int(size.max())), pad)
    for row, exchange in zip(tokens, exchanges, strict=True):
        row[: len(exchange.ids)] = torch.tensor(exchange.ids)
    start = torch.tensor([int(exchange.ids[0] == lead) for exchange in exchanges])
    return Windows(tokens, counted_positions(tokens, size, start, rule), torch.arange(len(exchanges)), size)


def counted_ids(windows: Windows) -> list[list[int]]:
    """Return the tokens of each window that are counted: what a token model scores."""
    return [tokens[counted].tolist() for tokens, counted in zip(windows.tokens, windows.counted, strict=True)]
