"""Vectors of a truncated model equal those of the whole model, at every site of every kind of model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Glm4Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    T5Config,
    ViTConfig,
)

from rudder.sae_models.activations import corpus, harvest, hooks, store, stream
from rudder.sae_models.activations.corpus import ContextRule, Document, Windows
from rudder.sae_models.activations.hooks import Site, hooked, parse_site
from rudder.sae_models.activations.store import Content
from rudder.sae_models.hookpoints import POINTS
from tests.unit import tiny

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
CAUSAL = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=0),
    "bloom": BloomConfig(vocab_size=64, hidden_size=16, n_layer=3, n_head=2),
    "cohere": CohereConfig(**SMALL, num_key_value_heads=1, logit_scale=1.0),
    "glm4": Glm4Config(**SMALL, num_key_value_heads=1, head_dim=8, pad_token_id=0),
    "granite": GraniteConfig(**SMALL, num_key_value_heads=1, residual_multiplier=0.22),
    "olmo2": Olmo2Config(**(SMALL | {"pad_token_id": 0}), num_key_value_heads=1),
    "opt": OPTConfig(**(SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16})),
}
OTHERS = {
    "bert": BertConfig(**SMALL),
    "vit": ViTConfig(image_size=8, patch_size=4, **{key: SMALL[key] for key in SMALL if key != "vocab_size"}),
    "t5": T5Config(vocab_size=64, d_model=16, d_ff=24, num_layers=3, num_heads=2, d_kv=8),
}


def save_random_model(name: str, folder: Path) -> Any:
    """Save a randomly initialised model and return it."""
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if name in CAUSAL else AutoModel
    model = kind.from_config((CAUSAL | OTHERS)[name]).eval()
    model.save_pretrained(folder)
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    """Return model inputs for a batch of two."""
    g = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=g)}
    return {"input_ids": torch.randint(2, 64, (2, 6), generator=g)}


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_trunk_has_the_residual_stream_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = save_random_model(name, tmp_path)
    model = model.get_encoder() if name == "t5" else model
    requested = [parse_site("layers.0.resid_post"), parse_site("layers.1.resid_pre"), parse_site("layers.1.resid_post")]
    trunk = harvest.load_trunk(tmp_path, *requested)
    assert len(hooks.layers_of(trunk)) == 2
    ((first, before, second),) = harvest.activations(trunk, requested, [inputs_of(name)])
    with torch.no_grad():
        hidden = model(**inputs_of(name), output_hidden_states=True).hidden_states
    assert first.shape == (2, 5 if name == "vit" else 6, 16)
    assert torch.equal(first, before)
    assert torch.allclose(first, hidden[1], atol=1e-5)
    assert torch.allclose(second, hidden[2], atol=1e-5)


@pytest.mark.parametrize("name", [*CAUSAL, "vit"])
def test_branch_outputs_add_up_to_the_residual_stream(name: str, tmp_path: Path) -> None:
    save_random_model(name, tmp_path)
    points = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    requested = [Site(1, point) for point in points]
    trunk = harvest.load_trunk(tmp_path, *requested)
    ((before, attention, mlp, after),) = harvest.activations(trunk, requested, [inputs_of(name)])
    assert torch.allclose(before + attention + mlp, after, atol=1e-5)
    assert float(attention.abs().max()) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit"])
def test_mlp_in_is_the_input_of_the_mlp(name: str, tmp_path: Path) -> None:
    save_random_model(name, tmp_path)
    requested = [Site(1, "mlp_in"), Site(1, "mlp_out")]
    trunk = harvest.load_trunk(tmp_path, *requested)
    ((read, written),) = harvest.activations(trunk, requested, [inputs_of(name)])
    assert read.shape == written.shape == (2, 5 if name == "vit" else 6, 16)
    assert torch.allclose(mlp_of(hooks.layers_of(trunk)[1])(read), written, atol=1e-5)


def mlp_of(layer: Any) -> nn.Module:
    """Return the MLP of a layer as a single module."""
    if hasattr(layer, "mlp"):
        mlp: nn.Module = layer.mlp
        return mlp
    if hasattr(layer, "fc1"):
        return nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2)
    return nn.Sequential(layer.intermediate, layer.output.dense)


@pytest.mark.parametrize("point", [point for point in POINTS if point != "resid_mid"])
def test_post_norm_encoder_has_every_hook_point(point: str, tmp_path: Path) -> None:
    save_random_model("bert", tmp_path)
    trunk = harvest.load_trunk(tmp_path, Site(1, point))
    ((x,),) = harvest.activations(trunk, [Site(1, point)], [inputs_of("bert")])
    assert x.shape == (2, 6, 16)


def test_post_norm_encoder_has_no_resid_mid(tmp_path: Path) -> None:
    save_random_model("bert", tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.resid_mid: the branches of BertLayer do not follow"):
        harvest.load_trunk(tmp_path, Site(1, "resid_mid"))


@pytest.mark.parametrize("name", [*(name for name in CAUSAL if name != "cohere"), "vit"])
def test_resid_mid_plus_mlp_out_is_resid_post(name: str, tmp_path: Path) -> None:
    save_random_model(name, tmp_path)
    requested = [Site(1, point) for point in ("resid_mid", "mlp_out", "resid_post")]
    trunk, push = harvest.load_trunk(tmp_path, *requested), torch.randn(16)
    ((middle, added, post),) = harvest.activations(trunk, requested, [inputs_of(name)])
    assert torch.allclose(middle + added, post, atol=1e-5)
    with hooked(trunk, requested[0], lambda x: x + push):
        ((added, post),) = harvest.activations(trunk, requested[1:], [inputs_of(name)])
    assert torch.allclose(middle + push + added, post, atol=1e-5)


def test_parallel_branches_have_no_resid_mid(tmp_path: Path) -> None:
    save_random_model("cohere", tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.resid_mid: CohereDecoderLayer: its branches do not follow"):
        harvest.load_trunk(tmp_path, Site(1, "resid_mid"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "granite"])
@pytest.mark.parametrize("point", ["attn_out", "mlp_out"])
def test_edit_of_a_branch_moves_the_residual_stream_as_far(name: str, point: str, tmp_path: Path) -> None:
    """BLOOM's modules return the stream with the branch; Granite multiplies a branch before it adds it."""
    save_random_model(name, tmp_path)
    site, push = Site(1, point), torch.randn(16)
    behind = Site(1, "resid_mid" if point == "attn_out" else "resid_post")
    trunk = harvest.load_trunk(tmp_path, site, behind)
    ((x,),) = harvest.activations(trunk, [behind], [inputs_of(name)])
    with hooked(trunk, site, lambda x: x + push):
        ((moved,),) = harvest.activations(trunk, [behind], [inputs_of(name)])
    assert torch.allclose(moved, x + push, atol=1e-5)


@torch.no_grad()
def test_branch_hooked_behind_an_edit_is_measured_without_it(tmp_path: Path) -> None:
    model = save_random_model("llama", tmp_path)
    seen: list[Tensor] = []
    with hooked(model, Site(0, "resid_post"), lambda x: 3 * x), hooked(model, Site(0, "mlp_out"), seen.append):
        assert not seen
        model(**inputs_of("llama"))
    assert len(seen) == 1


def test_padding_is_masked_in_an_encoder_and_not_counted(tmp_path: Path) -> None:
    save_random_model("bert", tmp_path)
    site = parse_site("layers.1.resid_post")
    trunk = harvest.load_trunk(tmp_path, site)
    tokens = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 6, 7]])
    counted = torch.tensor([[False, True, True, False, False], [False, True, True, True, True]])
    windows = Windows(tokens, counted, torch.zeros(2, dtype=torch.long), torch.tensor([3, 5]))
    padded = torch.cat([x[mask] for x, mask in harvest.residuals(trunk, site, windows)])
    ((alone,),) = harvest.activations(trunk, [site], [{"input_ids": tokens[:1, :3]}])
    assert padded.shape == (6, 16)
    assert torch.allclose(padded[:2], alone[0, 1:], atol=1e-5)


def test_windows_start_with_cls_or_nothing_if_the_tokenizer_has_no_bos() -> None:
    class Plain:
        bos_token_id, eos_token_id = None, None
        special: tuple[int, ...] = ()

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            """Return the ids of a text."""
            return [*self.special * add_special_tokens, *map(ord, text)]

        def __call__(self, text: str, add_special_tokens: bool, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": self.encode(text, add_special_tokens)}

    class Encoder(Plain):
        cls_token_id, special = 1, (1,)

    documents = [Document("a", "m", "abcdef")]
    bare = corpus.windows(documents, Plain(), 4)
    assert bare.tokens.tolist() == [[97, 98, 99, 100], [101, 102, 0, 0]]
    assert bare.attention_mask.tolist() == bare.counted.tolist() == [[True] * 4, [True, True, False, False]]
    headed = corpus.windows(documents, Encoder(), 4)
    assert headed.tokens.tolist() == [[1, 97, 98, 99], [1, 100, 101, 102]]
    assert headed.counted.tolist() == [[False, True, True, True]] * 2


def letters(count: int, start: int = 0) -> Document:
    """Return a document of `count` tokens for `Letters`."""
    return Document("a", f"m{start}", "".join(chr(97 + (start + i) % 20) for i in range(count)))


class Letters:
    """A tokenizer of letters with BOS 1, spelled `^`, which it puts in front of a text if `adds`."""

    bos_token_id, bos_token, eos_token_id, adds = 1, "^", 0, False

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text."""
        ids = [1 if letter == "^" else ord(letter) - 90 for letter in text]
        return [1, *ids] if self.adds and add_special_tokens else ids

    def __call__(self, text: str, add_special_tokens: bool, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}


class BosLetters(Letters):
    """The same, with BOS."""

    adds = True


@pytest.mark.parametrize(
    ("tokenizer", "prepend_bos", "expected"),
    [(Letters(), None, False), (BosLetters(), None, True), (Letters(), True, True), (BosLetters(), False, False)],
)
def test_contexts_start_with_bos_as_the_tokenizer_does_or_the_rule_says(
    tokenizer: Letters, prepend_bos: bool | None, expected: bool
) -> None:
    windows = corpus.windows([letters(5)], tokenizer, 4, ContextRule(prepend_bos))
    assert [ids[0] == 1 for ids in windows.tokens.tolist()] == [expected] * len(windows)
    assert int(windows.counted.sum()) == 5
    assert int((windows.tokens == 1).sum()) == (len(windows) if expected else 0)


@pytest.mark.parametrize(
    ("tokenizer", "prepend_bos"), [(BosLetters(), False), (Letters(), True), (BosLetters(), True), (BosLetters(), None)]
)
def test_text_that_spells_bos_has_one_which_is_not_counted(tokenizer: Letters, prepend_bos: bool | None) -> None:
    windows = corpus.windows([Document("a", "m", "^abc")], tokenizer, 8, ContextRule(prepend_bos))
    assert windows.tokens[0, :5].tolist() == [1, 7, 8, 9, 0]
    assert windows.counted[0].tolist() == [False, True, True, True, False, False, False, False]
    assert windows.attention_mask[0].tolist() == [True] * 4 + [False] * 4


def test_rule_excludes_positions_of_each_context_and_tokens_anywhere() -> None:
    rule = ContextRule(True, excluded_positions=(1, 2), excluded_tokens=(8,))
    windows = corpus.windows([Document("a", "m", "xbcbde")], Letters(), 6, rule)
    assert windows.counted.tolist() == [[False, False, False, True, False, True], [False] * 6]
    assert windows.attention_mask.sum(1).tolist() == [6, 2]
    with pytest.raises(corpus.CorpusError, match="every token is at an excluded position"):
        corpus.windows([letters(2)], Letters(), 6, ContextRule(True, (1, 2)))


@pytest.mark.parametrize("lengths", [[20] * 400, [20, 255] * 60, [*range(3, 250, 5)] * 2, [600, 7, 300, 1] * 8])
def test_forward_passes_compute_little_padding_and_keep_the_order(lengths: list[int], tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    site = parse_site("layers.0.resid_post")
    trunk = harvest.load_trunk(tmp_path, site)
    windows = corpus.windows([letters(n, i) for i, n in enumerate(lengths)], Letters(), 256, ContextRule(True))
    computed: list[int] = []
    trunk.base_model.embed_tokens.register_forward_hook(lambda _, args, __: computed.append(args[0].numel()))
    parts = list(harvest.residuals(trunk, site, windows.shuffled(3)))
    assert sum(computed) < int(windows.attention_mask.sum()) / 0.8
    assert sum(int(counted.sum()) for _, counted in parts) > 0.7 * sum(computed)
    tokens = windows.shuffled(3).tokens
    start = 0
    for x, counted in parts:
        alone = next(harvest.activations(trunk, [site], [{"input_ids": tokens[start : start + 1]}]))[0]
        assert torch.allclose(x[0][counted[0]], alone[0, : x.shape[1]][counted[0]], atol=1e-5)
        start += len(x)
    assert start == len(windows)


def test_text_source_yields_each_token_once_at_every_site(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    tokenizer = harvest.load_tokenizer(tmp_path)
    documents = [Document("a", f"m{number}", f"cells {number} divide and rule") for number in range(70)]
    windows = corpus.windows(documents, tokenizer, 8)
    requested = (parse_site("layers.0.resid_post"), parse_site("layers.1.mlp_in"))
    live = stream.TextSource(harvest.load_trunk(tmp_path, *requested), requested, windows)
    assert sum(live.chunk_sizes) == int(windows.counted.sum())
    whole = live.load(range(len(live.chunk_sizes)))
    apart = live.load([1])
    assert [x.shape for x in whole.values()] == [(sum(live.chunk_sizes), 16)] * 2
    for site, x in apart.items():
        assert torch.equal(x, whole[site][live.chunk_sizes[0] : live.chunk_sizes[0] + live.chunk_sizes[1]])


def test_stored_vectors_come_back_window_by_window(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    tokenizer, site = harvest.load_tokenizer(tmp_path), parse_site("layers.0.resid_post")
    documents = [Document("a", f"m{number}", "cells divide and rule " * (1 + number % 5)) for number in range(70)]
    windows = corpus.windows(documents, tokenizer, 8).shuffled(0)
    trunk = harvest.load_trunk(tmp_path, site)
    live = stream.TextSource(trunk, (site,), windows)
    content = Content("m", "0", "1", (str(site),), 8, 0, sum(live.chunk_sizes) - 3, "bfloat16")
    stored = store.write(tmp_path / "store", content, live)
    for part in (windows, windows.first(300), windows.first(40)):
        expected = harvest.text_activations(trunk, [site], part)
        stored_chunks = stream.by_window(stored, [str(site)], part)
        for (xs, counted), (ys, also_counted) in zip(expected, stored_chunks, strict=True):
            missing = int((counted & ~also_counted).sum())
            assert missing == (3 if part is windows and len(counted) < 32 else 0) or missing == 0
            assert not (also_counted & ~counted).any()
            assert torch.allclose(xs[0][also_counted], ys[0][also_counted], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("site", "problem"),
    [("layers.3.resid_post", r"site: layer 3 is not in 0\.\.2"), ("layers.0.mlp_out", "has none of layer_scale2")],
)
def test_model_without_the_site_is_refused(site: str, problem: str, tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    model = harvest.load_model(tmp_path)
    del hooks.layers_of(model)[0].mlp
    with pytest.raises(ValueError, match=problem):
        hooks.module_at(model, parse_site(site))


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^model: no config.json in {tmp_path}"):
        harvest.load_model(tmp_path)
