"""A run's store serves its training, evaluation and catalogue, and chats stand beside the corpus in every part."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rudder.sae_models.activations import corpus, harvest, store
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.bundle import bundle
from rudder.sae_models.files import lock_folder
from rudder.sae_models.training import config, data, run
from rudder.sae_models.training.config import ConfigError
from tests.unit import tiny


@pytest.fixture
def windows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of windows of each forward pass of a trunk."""
    counts: list[int] = []
    original: Callable[..., Iterator[Any]] = harvest.activations

    def counting(trunk: Any, sites: Any, batches: Any) -> Iterator[Any]:
        listed = list(batches)
        counts.extend(len(batch["input_ids"]) for batch in listed)
        return original(trunk, sites, listed)

    monkeypatch.setattr(harvest, "activations", counting)
    return counts


def figures_of(folder: Path) -> dict[str, Any]:
    """Return the evaluation of a run's only SAE."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [line["evaluation"] for line in lines if "evaluation" in line]
    return dict(evaluation)


def test_evaluation_and_catalogue_read_the_store_instead_of_running_the_model(
    tmp_path: Path, windows_run: list[int]
) -> None:
    settings = tiny.plain(tmp_path, tokens=1280)
    settings["data"]["store"] = str(tmp_path / "store")
    (live,) = run.run(config.convert(settings | {"out": str(tmp_path / "live"), "data": {"block": 2000}}))
    run.run(config.convert(settings))
    windows_run.clear()
    (stored,) = run.run(config.convert(settings | {"out": str(tmp_path / "again")}))
    assert windows_run == []
    from_store, from_model = figures_of(tmp_path / "again"), figures_of(tmp_path / "live")
    for name in ("fvu", "l0", "probe_5", "ce_recovered"):
        assert from_store[name] == pytest.approx(from_model[name], rel=0.05), name
    read, run_again = (bundle.load(path).statistics.frequency for path in (stored, live))
    assert torch.allclose(read, run_again, atol=0.02)


def test_evaluation_runs_the_windows_that_it_was_asked_for(tmp_path: Path, windows_run: list[int]) -> None:
    settings = tiny.plain(tmp_path)
    settings["evaluation"]["tokens"] = 100
    inputs = data.load_inputs(config.convert(settings))
    data.sample_vectors(inputs.held_out, 100)
    assert sum(windows_run) == 4


def test_training_begins_while_the_store_is_written(tmp_path: Path) -> None:
    settings = config.convert(tiny.plain(tmp_path, tokens=640) | {"data": {"store": str(tmp_path / "store")}})
    inputs = data.load_inputs(settings)
    content = data.store_content(settings, inputs.train)
    data.harvest_stores(settings, inputs)
    manifest = store.read_manifest(tmp_path / "store")
    assert manifest.complete
    part_of_it = {"store": str(tmp_path / "store"), "tokens": 500}
    fewer = config.convert(tiny.plain(tmp_path, tokens=640) | {"data": part_of_it})
    with lock_folder(tmp_path / "store"):
        part, _ = data.harvest_stores(fewer, inputs)
    assert 500 <= part.tokens <= content.tokens


def save_chats(path: Path, count: int) -> Path:
    """Write chats about two books."""
    with path.open("w") as file:
        for number in range(count):
            contents = (("user", "What is a cell?"), ("assistant", "Cells divide, and viruses need a host."))
            messages = [{"role": role, "content": content} for role, content in contents]
            record = {"book": f"book{number % 2}", "module": f"chat-{number}", "messages": messages}
            file.write(json.dumps(record) + "\n")
    return path


def test_a_run_trains_on_chats_and_its_store_belongs_to_them(tmp_path: Path) -> None:
    settings = tiny.plain(tmp_path, tokens=1280, window=64, exclude_special_tokens=True)
    shutil.copyfile(tiny.TEXTBOOK_LM / "chat_template.jinja", Path(settings["model"]) / "chat_template.jinja")
    settings |= {"chats": str(save_chats(tmp_path / "chats.jsonl", 60)), "data": {"store": str(tmp_path / "store")}}
    text = data.load_windows(config.convert(settings))
    chats = torch.tensor([bool(document.messages) for document in text.documents])[text.train.document]
    assert chats.any()
    assert not chats.all()
    (path,) = run.run(config.convert(settings))
    bundle.load(path)
    save_chats(tmp_path / "chats.jsonl", 61)
    with pytest.raises(store.StoreError, match="chats_sha256"):
        run.run(config.convert(settings | {"out": str(tmp_path / "second")}))


def test_chats_are_the_same_share_of_every_prefix() -> None:
    tokenizer = harvest.load_tokenizer(tiny.TEXTBOOK_LM)
    chat = (("user", "What is a cell?"), ("assistant", "Cells divide, and viruses need a host."))
    documents = [Document("a", f"m{number}", "cells divide and rule " * 20) for number in range(40)]
    documents += [Document("b", f"c{number}", "x", messages=chat) for number in range(60)]
    windows = data.with_chats_spread(corpus.windows(documents, tokenizer, 64), documents, 0.25)
    is_chat = torch.tensor([bool(document.messages) for document in documents])[windows.document]
    tokens = windows.counted.sum(1)
    shares = (tokens * is_chat).cumsum(0) / tokens.cumsum(0)
    last = int(is_chat.nonzero().max())
    assert ((shares[20:last] - 0.25).abs() < 0.05).all()
    assert is_chat.sum() == 60


def test_chats_need_a_corpus(tmp_path: Path) -> None:
    settings = tiny.plain(tmp_path) | {"corpus": None, "vectors": "store", "chats": "chats.jsonl"}
    with pytest.raises(ConfigError, match=r"^chats: need a corpus"):
        config.convert(settings)
