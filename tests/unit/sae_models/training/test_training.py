"""Harvest excludes BOS and padding; evaluation metrics are correct; latents are labelled by words and books."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rudder.sae_models import fidelity
from rudder.sae_models.activations import corpus, harvest, hooks
from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.evaluation import activity, probing, splicing
from rudder.sae_models.evaluation.probing import Labelled
from rudder.sae_models.sae import SAE

SITE = hooks.parse_site("layers.1.resid_post")


class Letters:
    """A tokenizer with one token per character, which puts BOS in front of a text."""

    bos_token_id, eos_token_id = 1, 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text."""
        return [self.bos_token_id] * add_special_tokens + [ord(letter) for letter in text]

    def __call__(self, text: str, add_special_tokens: bool, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}

    def __len__(self) -> int:
        return 128

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
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


def test_windows_start_with_bos_and_do_not_count_it(windows: Windows) -> None:
    assert windows.tokens[:, 0].tolist() == [1] * 5
    assert windows.counted.sum(1).tolist() == [7, 7, 7, 2, 4]
    assert windows.document.tolist() == [0, 0, 0, 0, 1]
    text = "".join(map(chr, windows.tokens[windows.counted].tolist()))
    assert text == "The cat sat on the mat.Cats"
    assert len(windows.first(8)) == 2
    assert len(windows.first(1000)) == 5


def test_folds_depend_on_book_and_module_only() -> None:
    assert Document("a", "m1", "text").fold == Document("a", "m1", "other text").fold
    assert len({Document("a", f"m{i}", "").fold for i in range(400)}) == corpus.FOLDS


def test_harvest_equals_the_hidden_states_of_the_whole_model(model: Any, windows: Windows, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    hidden = model(windows.tokens, output_hidden_states=True).hidden_states
    trunk = harvest.load_trunk(tmp_path, SITE)
    assert len(hooks.layers_of(trunk)) == 2
    for site, layer in ((SITE, 2), (hooks.parse_site("layers.1.resid_pre"), 1)):
        harvested = torch.cat([x[counted] for x, counted in harvest.residuals(trunk, site, windows)])
        assert torch.allclose(harvested, hidden[layer][windows.counted], atol=1e-5)


def test_losses_exclude_padding(model: Any, windows: Windows) -> None:
    sums = splicing.losses(model, windows)
    logits = model(windows.tokens[3:4, :3]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:2], windows.tokens[3, 1:3], reduction="sum")
    assert sums[3, 1] == 2
    assert sums[3, 0] == pytest.approx(expected.item(), rel=1e-4)


def test_ce_recovered_is_1_for_a_perfect_and_0_for_an_empty_sae(model: Any, windows: Windows) -> None:
    d, mean = 16, torch.zeros(16)
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    perfect = SAE(both, torch.zeros(2 * d), torch.zeros(2 * d), both, mean)
    empty = SAE(both, torch.zeros(2 * d), torch.full((2 * d,), 1e9), both, mean)
    perfect_result = splicing.splice(model, SITE, perfect, mean, windows)
    assert perfect_result.recovered == pytest.approx(1.0, abs=1e-3)
    assert perfect_result.kl == pytest.approx(0.0, abs=1e-5)
    nats, count = splicing.losses(model, windows).sum(0)
    assert perfect_result.ce == pytest.approx(float(nats / count), rel=1e-5)
    empty_result = splicing.splice(model, SITE, empty, mean, windows)
    assert empty_result.recovered == pytest.approx(0.0, abs=1e-6)
    assert empty_result.kl > 1e-4


def test_edits_apply_at_the_site_except_bos(model: Any, windows: Windows) -> None:
    changed: list[Tensor] = []
    with (
        hooks.hooked(model, SITE, splicing.skip_bos(lambda x: x + 1)),
        hooks.hooked(model, hooks.Site(2, "resid_pre"), changed.append),
    ):
        model(windows.tokens)
    plain = model(windows.tokens, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(changed[0][:, 1:], plain[:, 1:] + 1, atol=1e-5)
    assert torch.equal(changed[0][:, 0], plain[:, 0])


def test_words_are_whole_and_lower_case(windows: Windows) -> None:
    sample = activity.sample_of(windows, [Document("one", "a", ""), Document("two", "b", "")], Letters())
    spelled = [[sample.vocabulary[word] for word in row] for row in sample.word.tolist()]
    assert [sample.books[book] for book in sample.book.tolist()] == ["one"] * 4 + ["two"]
    assert spelled[0][1:4] == ["the"] * 3
    assert spelled[0][5:8] == ["cat"] * 3


@pytest.mark.parametrize(
    "text", ["layers.x.resid_post", "layers.1.mlp", "layers.-1.resid_pre", "resid_post", "layers.1.resid_post.", ""]
)
def test_malformed_site_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^site: "):
        hooks.parse_site(text)


def test_missing_site_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"^site: layer 3 is not in 0\.\.2"):
        hooks.layer_at(model, hooks.Site(3, "resid_post"))
    with pytest.raises(ValueError, match=r"^model: Linear has 0 lists of layers"):
        hooks.layers_of(torch.nn.Linear(2, 2))


def test_transcoder_is_spliced_at_its_output_site(model: Any, windows: Windows) -> None:
    mlp = copy.deepcopy(model.model.layers[1].mlp)

    class Exact:
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return mlp(x), x

    read, written = hooks.Site(1, "mlp_in"), hooks.Site(1, "mlp_out")
    exact: Any = Exact()
    result = splicing.splice(model, read, exact, torch.zeros(16), windows, written)
    assert result.ce_spliced == pytest.approx(result.ce, rel=1e-6)
    assert result.kl == pytest.approx(0.0, abs=1e-6)
    assert result.ce_ablated != pytest.approx(result.ce, rel=1e-6)


def test_fidelity_equals_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(500, 8, generator=g) + 5
    encoder = torch.randn(24, 8, generator=g)
    sae = SAE(encoder, torch.randn(24, generator=g), torch.full((24,), 0.5), 0.1 * encoder, x.mean(0))
    latents = sae.encode(x)
    y = sae.decode(latents)
    centred, moved = x - x.mean(0), y - x.mean(0)
    result = fidelity.measure(sae, x)
    assert result.fvu == pytest.approx(float((x - y).square().sum() / centred.square().sum()), rel=1e-5)
    assert result.l0 == pytest.approx(float((latents > 0).sum(1).float().mean()), rel=1e-5)
    assert result.shrinkage == pytest.approx(float(moved.square().sum() / (moved * centred).sum()), rel=1e-4)
    assert torch.allclose(result.frequency, (latents > 0).float().mean(0))
    assert result.dead_share == pytest.approx(float((result.frequency == 0).float().mean()))


def test_shrinkage_is_one_for_a_perfect_and_half_for_a_halving_sae() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    both, zero = torch.cat([torch.eye(8), -torch.eye(8)]), torch.zeros(16)
    for factor in (1.0, 0.5):
        result = fidelity.measure(SAE(both, zero, zero, factor * both, (1 - factor) * x.mean(0)), x)
        assert result.shrinkage == pytest.approx(factor, abs=0.01)


def test_nearest_direction_excludes_itself() -> None:
    directions = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 3, 3], [-1, 0, 0]])
    assert torch.allclose(splicing.max_cosines(directions), torch.tensor([0, 0.5**0.5, 0.5**0.5, 0]), atol=1e-6)


def test_probe_selects_the_informative_latents() -> None:
    g = torch.Generator().manual_seed(0)
    label = torch.arange(120) % 3
    features = torch.randn(120, 30, generator=g)
    features[:, 7] += 8 * (label == 0)
    features[:, 11] += 8 * (label == 1)
    features[:, 13] += 8 * (label == 2)
    train, test = Labelled(features[:60], label[:60]), Labelled(features[60:], label[60:])
    noise = Labelled(torch.randn(60, 30, generator=g), label[60:])
    assert probing.balanced_accuracy(train, test, 1) > 0.95
    assert probing.balanced_accuracy(train, noise, 1) < 0.7
    with pytest.raises(ValueError, match=r"^probing: training and test windows do not have the same classes"):
        probing.balanced_accuracy(train, Labelled(features[60:], label[60:].clamp(max=1)), 1)
