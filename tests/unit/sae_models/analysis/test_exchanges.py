"""Exchanges: limits, splits and what is counted; token models learn from them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rudder.sae_models.activations.corpus import ContextRule, Document
from rudder.sae_models.activations.harvest import load_tokenizer
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.exchanges import (
    REPORT,
    SPLITS,
    TRAIN,
    Exchange,
    as_windows,
    behind_benign,
    counted_ids,
    of_corpus,
    of_prompts,
    read_prompts,
    split_of,
)
from rudder.sae_models.analysis.guard_training import weights_of
from rudder.sae_models.analysis.token_training import SETTINGS, fit_tokens
from tests.unit.tiny import TEXTBOOK_LM

TOPIC = Topic(("a",), ("b",))
DOCUMENTS = [Document("abc"[i % 3], f"m{i}", f"section {i} of a book about cells " * 10) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(TEXTBOOK_LM)


def test_splits_are_by_section_and_all_of_some_size() -> None:
    sizes = Counter(split_of(document) for document in DOCUMENTS)
    assert set(sizes) == set(SPLITS)
    assert sizes[TRAIN] > sizes[REPORT] > 0.2 * len(DOCUMENTS)


def test_exchanges_of_a_corpus_keep_their_limits(tokenizer: object) -> None:
    found = of_corpus(DOCUMENTS, tokenizer, TOPIC, TRAIN, 16, {"a": 11, "b": 5}, per_section=3)
    assert Counter(exchange.group for exchange in found) == {"a": 11, "b": 5}
    assert all(exchange.label == (exchange.group == "a") for exchange in found)
    assert max(Counter(exchange.cluster for exchange in found).values()) == 3
    modules = {exchange.cluster.partition("/")[2] for exchange in found}
    assert {split_of(document) for document in DOCUMENTS if document.module in modules} == {TRAIN}
    bos = tokenizer.bos_token_id  # type: ignore[attr-defined]
    assert all(exchange.ids[0] == bos and len(exchange.ids) == 17 for exchange in found)


def test_every_second_exchange_stands_behind_benign_text(tokenizer: object) -> None:
    bos = tokenizer.bos_token_id  # type: ignore[attr-defined]
    given = [Exchange((bos, *range(10 * i, 10 * i + 5)), float(i < 4), "", str(i), TRAIN) for i in range(8)]
    benign = {token for exchange in given[4:] for token in exchange.ids}
    found = behind_benign(given, 50, tokenizer)
    assert found[::2] == given[::2]
    lengths = set()
    for before, after in zip(given[1::2], found[1::2], strict=True):
        assert (after.ids[0], after.ids[-5:], after.label) == (bos, before.ids[1:], before.label)
        assert set(after.ids[1:-5]) <= benign - {bos}
        assert len(after.ids) <= 51
        lengths.add(len(after.ids))
    assert len(lengths) > 2


def test_what_a_server_does_not_count_is_not_counted(tokenizer: object) -> None:
    bos = tokenizer.bos_token_id  # type: ignore[attr-defined]
    members = [Exchange(ids, 0.0, "", "", TRAIN) for ids in ((bos, 5, 6, 7), (8, 9), (bos, 5, bos, 6))]
    windows = as_windows(members, tokenizer, ContextRule(excluded_positions=(1,), excluded_tokens=(7,)))
    # BOS in front is not counted; anywhere else it is.
    assert counted_ids(windows) == [[6], [8], [bos, 6]]


def test_prompts_without_a_split_get_one(tokenizer: object, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join('{"text": "a text", "label": 0.25}' for _ in range(10)))
    prompts = read_prompts(path)
    assert Counter(prompt.split for prompt in prompts) == {"train": 6, "tune": 2, "report": 2}
    exchanges = of_prompts(prompts, tokenizer, chat=False)
    assert exchanges[0].ids[0] == tokenizer.bos_token_id  # type: ignore[attr-defined]
    assert {exchange.label for exchange in exchanges} == {0.25}


def test_token_models_learn_what_one_class_says() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(100, 200, (40,), generator=generator).tolist() for _ in range(400)]
    for text in texts[::2]:
        text[20:24] = [7, 8, 9, 7]
    members = [Exchange(tuple(text), float(i % 2 == 0), "", str(i), TRAIN) for i, text in enumerate(texts)]
    label, weight = torch.tensor([each.label for each in members]), weights_of(members)
    model = fit_tokens(texts[:340], label[:340], weight[:340], "v", settings=replace(SETTINGS, learning_rate=0.1))
    means = [model.scores(text)[16:28].mean() for text in texts[340:]]
    assert min(means[::2]) > max(means[1::2])
