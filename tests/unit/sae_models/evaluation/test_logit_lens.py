"""The logit lens agrees with the effect of a decoder direction on the model's own logits."""

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rudder.sae_models.evaluation import logit_lens as lens

V, D = 40, 16
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Numbers:
    """A tokenizer whose text of a token is its number."""

    def decode(self, ids: list[int]) -> str:
        """Return the token ids as text."""
        return " ".join(map(str, ids))


def models() -> dict[str, Any]:
    """Return models whose final norms store a gain, a gain minus 1, and a gain and a bias, all non-trivial."""
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, **heads)),
        "gemma": Gemma2ForCausalLM(Gemma2Config(**SIZES, **heads)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2)),
    }
    with torch.no_grad():
        for model in models.values():
            for name, parameter in model.base_model.named_parameters():
                if name.startswith(("norm", "ln_f")):
                    parameter.add_(torch.randn_like(parameter))
    return models


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
@torch.no_grad()
def test_lens_equals_the_change_of_the_logits_along_a_direction(name: str) -> None:
    model = models()[name].eval()
    norm = model.base_model.ln_f if name == "gpt2" else model.base_model.norm
    x, direction = torch.randn(D).double(), torch.randn(D).double()
    x, direction = x - x.mean(), direction - direction.mean()
    model, small = model.double(), 1e-2
    # To first order the final norm's scale also changes, but only along x: use a direction orthogonal to x.
    direction -= (direction @ x) / (x @ x) * x
    scale = 1 / x.square().mean().sqrt()
    moved = model.lm_head(norm(x + small * direction)) - model.lm_head(norm(x - small * direction))
    expected = (moved / (2 * small) / scale).float()
    assert torch.allclose(lens.unembedding(model.float()) @ direction.float(), expected, atol=1e-3)


def test_words_are_sorted_and_from_the_vocabulary() -> None:
    decoder = torch.eye(D)[:3].bfloat16()
    unembedded = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    vocabulary = torch.arange(5, V)
    words = list(lens.words(decoder, unembedded, vocabulary, Numbers()))
    assert len(words) == 3
    column = unembedded[5:, 1] - unembedded[5:, 1].mean()
    promoted, suppressed = words[1]
    assert [int(word.token) for word in promoted] == (column.topk(lens.TOP_WORDS).indices + 5).tolist()
    assert [int(word.token) for word in suppressed] == (column.topk(lens.TOP_WORDS, largest=False).indices + 5).tolist()
    assert promoted[0].logit == pytest.approx(float(column.max()), abs=1e-5)


def test_unembedding_refuses_a_model_without_a_head() -> None:
    with pytest.raises(ValueError, match=r"^model: GPT2Model has no output embedding"):
        lens.unembedding(models()["gpt2"].base_model)
