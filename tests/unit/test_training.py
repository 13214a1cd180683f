"""The harvest leaves out BOS and padding; the measures are right; one command goes from corpus to bundle."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sae_models import bundle
from sae_models.sae import SAE
from sae_models.training import catalogue as entries
from sae_models.training import corpus, harvest, metrics, sites
from sae_models.training.__main__ import main
from sae_models.training.corpus import CorpusError, Document, Windows

PRETRAINED = Path(bundle.__file__).parent / "pretrained"
SITE = sites.parse_site("layers.1.resid_post")


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id, eos_token_id = 1, 0

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert (add_special_tokens, verbose) == (False, False)
        return {"input_ids": [ord(letter) for letter in text]}

    def __len__(self) -> int:
        return 128

    def decode(self, ids: list[int]) -> str:
        """Text of the ids."""
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def model() -> Any:
    """A random Llama of three layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Two documents in windows of eight."""
    documents = [Document("one", "a", "The cat sat on the mat."), Document("two", "b", "Cats")]
    return corpus.windows(documents, Letters(), 8)


def test_windows_begin_with_bos_and_do_not_count_it(windows: Windows) -> None:
    assert windows.tokens[:, 0].tolist() == [1] * 5
    assert windows.counted.sum(1).tolist() == [7, 7, 7, 2, 4]
    assert windows.document.tolist() == [0, 0, 0, 0, 1]
    text = "".join(map(chr, windows.tokens[windows.counted].tolist()))
    assert text == "The cat sat on the mat.Cats"
    assert len(windows.first(8)) == 2
    assert len(windows.first(1000)) == 5


def test_folds_depend_on_the_section_alone() -> None:
    assert Document("a", "m1", "text").fold == Document("a", "m1", "other text").fold
    assert len({Document("a", f"m{i}", "").fold for i in range(400)}) == corpus.FOLDS


def test_harvest_equals_the_hidden_states_of_the_whole_model(model: Any, windows: Windows, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    hidden = model(windows.tokens, output_hidden_states=True).hidden_states
    trunk = harvest.load_trunk(tmp_path, SITE)
    assert len(sites.layers_of(trunk)) == 2
    assert torch.allclose(harvest.counted_residuals(trunk, SITE, windows), hidden[2][windows.counted], atol=1e-5)
    before = sites.parse_site("layers.1.resid_pre")
    assert torch.allclose(harvest.counted_residuals(trunk, before, windows), hidden[1][windows.counted], atol=1e-5)


def test_batches_mix_and_lose_only_a_rest() -> None:
    chunks = [torch.arange(i * 10.0, i * 10 + 10)[:, None] for i in range(10)]
    batches = list(harvest.batches(chunks, 8, 40, torch.Generator().manual_seed(0)))
    values = torch.cat(batches).flatten().tolist()
    assert [len(batch) for batch in batches] == [8] * 12
    assert len(set(values)) == 96
    assert any(max(batch) - min(batch) > 20 for batch in batches)
    assert values != sorted(values)


def test_losses_leave_out_padding(model: Any, windows: Windows) -> None:
    sums = metrics.losses(model, windows)
    logits = model(windows.tokens[3:4, :3]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:2], windows.tokens[3, 1:3], reduction="sum")
    assert sums[3, 1] == 2
    assert sums[3, 0] == pytest.approx(expected.item(), rel=1e-4)


def test_recovered_loss_is_one_for_a_perfect_and_none_for_an_empty_sae(model: Any, windows: Windows) -> None:
    d, mean = 16, torch.zeros(16)
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    perfect = SAE(both, torch.zeros(2 * d), torch.zeros(2 * d), both, mean)
    empty = SAE(both, torch.zeros(2 * d), torch.full((2 * d,), 1e9), both, mean)
    assert metrics.ce_recovered(model, SITE, perfect, mean, windows) == pytest.approx(1.0, abs=1e-3)
    assert metrics.ce_recovered(model, SITE, empty, mean, windows) == pytest.approx(0.0, abs=1e-6)


def test_edits_reach_the_site_and_spare_bos(model: Any, windows: Windows) -> None:
    changed: list[Tensor] = []
    with (
        sites.hooked(model, SITE, metrics.behind_bos(lambda x: x + 1)),
        sites.hooked(model, sites.Site(2, "resid_pre"), changed.append),
    ):
        model(windows.tokens)
    plain = model(windows.tokens, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(changed[0][:, 1:], plain[:, 1:] + 1, atol=1e-5)
    assert torch.equal(changed[0][:, 0], plain[:, 0])


def test_words_are_whole_and_lower_case(windows: Windows) -> None:
    sample = entries.sample_of(windows, [Document("one", "a", ""), Document("two", "b", "")], Letters())
    spelled = [[sample.vocabulary[word] for word in row] for row in sample.word.tolist()]
    assert [sample.books[book] for book in sample.book.tolist()] == ["one"] * 4 + ["two"]
    assert spelled[0][1:4] == ["the"] * 3
    assert spelled[0][5:8] == ["cat"] * 3


def test_labels_name_words_and_the_books_that_stand_out() -> None:
    shares = {"microbiology": 0.6, "chemistry": 0.31, "us-history": 0.09}
    assert (
        entries.label_of([",", "virus", "viral", "virus", "viruses", "cell"], shares)
        == "virus, viral, viruses (microbiology, chemistry)"
    )
    assert entries.label_of(["the"], {"a": 0.2, "b": 0.2}) == "the"
    assert entries.label_of([","], {}) == ","
    assert entries.label_of([], {}) == entries.INACTIVE


@pytest.mark.parametrize("text", ["layers.x.resid_post", "layers.1.mlp", "resid_post", "layers.1.resid_post.", ""])
def test_a_site_must_be_spelled_right(text: str) -> None:
    with pytest.raises(ValueError, match=r"^site: "):
        sites.parse_site(text)


def test_a_site_must_exist(model: Any) -> None:
    with pytest.raises(ValueError, match=r"^site: layer 3 is not in 0\.\.2"):
        sites.layer_at(model, sites.Site(3, "resid_post"))
    with pytest.raises(ValueError, match=r"^model: Linear has decoder layers at none of"):
        sites.layers_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jsonl", None),
        ("empty.jsonl", b""),
        ("blank.jsonl", b'{"text": " "}\n'),
        ("binary.jsonl", bytes(range(256))),
        ("binary.jsonl.xz", bytes(range(256))),
        ("cut.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 1000)[:40]),
        ("list.jsonl", b'["text"]\n'),
        ("number.jsonl", b'{"text": 3}\n'),
        ("null.jsonl", b"null\n"),
    ],
)
def test_a_bad_corpus_is_refused_by_its_path(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"^corpus: {tmp_path / name}"):
        corpus.read(tmp_path / name)


def test_one_command_goes_from_corpus_to_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Cells divide. Viruses need a host, and the host may be a cell. " * 10
    rows = ({"book": f"book{i % 2}", "module": f"m{i}", "title": f"Section {i}", "text": text} for i in range(60))
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["--corpus", str(tmp_path / "corpus.jsonl"), "--model", str(PRETRAINED / "textbook-lm")]
    options = ["--latents", "256", "--k", "8", "--tokens", "20000", "--out", str(tmp_path / "toy-layers.1")]
    assert main([*command, *options, "--site", "layers.1.resid_post"]) == 0
    assert "tok/s" in capsys.readouterr().err
    made = bundle.load(tmp_path / "toy-layers.1")
    assert made.manifest.training.tokens == 20000
    assert 0 < made.manifest.training.fvu < 0.8
    labels = [summary.label for summary in made.catalogue.page(-1, 256)]
    assert any("viruses" in label or "cells" in label for label in labels)
    assert entries.INACTIVE in labels
    assert main([*command, *options, "--site", "layers.6.resid_post"]) == 2
    assert "error: site: layer 6 is not in 0..5" in capsys.readouterr().err
