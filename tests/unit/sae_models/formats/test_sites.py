"""Hook points of other libraries map to one site, or to none with a reason."""

import pytest

from rudder.sae_models.formats.sites import canonical, transformer_lens

LLAMA, GEMMA = "meta-llama/Llama-3.1-8B", "google/gemma-2-2b"


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.12.hook_resid_pre", "layers.12.resid_pre"),
        ("blocks.0.hook_attn_out", "layers.0.attn_out"),
        ("blocks.3.hook_resid_mid", "layers.3.resid_mid"),
        ("blocks.3.mlp.hook_in", "layers.3.mlp_in"),
        ("blocks.3.hook_mlp_out", "layers.3.mlp_out"),
        ("blocks.3.hook_resid_post", "layers.3.resid_post"),
        ("blocks.3.hook_out", "layers.3.resid_post"),
        ("hook_embed", "embed"),
        ("layers.7", "layers.7.resid_post"),
        ("h.7", "layers.7.resid_post"),
        ("model.layers.7", "layers.7.resid_post"),
        ("model.layers.7.output", "layers.7.resid_post"),
        ("model.language_model.layers.7.input", "layers.7.resid_pre"),
        ("gpt_neox.layers.7", "layers.7.resid_post"),
        ("transformer.h.7.mlp.input", "layers.7.mlp_in"),
        ("model.layers.7.pre_feedforward_layernorm.output", "layers.7.mlp_in"),
        ("model.layers.7.post_feedforward_layernorm.output", "layers.7.mlp_out"),
        ("embed_tokens", "embed"),
        ("model.embed_tokens", "embed"),
        ("transformer.wte", "embed"),
        ("resid_post_layer_8", "layers.8.resid_post"),
    ],
)
def test_names_of_libraries_map_to_sites(name: str, site: str) -> None:
    assert canonical(name) == (site, "")


@pytest.mark.parametrize("name", ["layers.7.mlp", "h.7.mlp.output", "mlp_out_layer_7", "blocks.7.mlp.hook_out"])
def test_mlp_module_is_mlp_out_unless_a_norm_follows(name: str) -> None:
    assert canonical(name, LLAMA) == ("layers.7.mlp_out", "")
    site, note = canonical(name, GEMMA)
    assert (site, "the norm that google/gemma-2-2b has" in note) == ("", True)
    site, note = canonical(name)
    assert (site, "layers.7.mlp_out, unless" in note) == ("", True)


@pytest.mark.parametrize("name", ["layers.7.self_attn", "transformer.h.7.attn", "attention_out_layer_7"])
def test_attention_module_is_attn_out_unless_a_norm_follows(name: str) -> None:
    assert canonical(name, LLAMA)[0] == "layers.7.attn_out"
    assert canonical(name, GEMMA)[0] == ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("blocks.3.attn.hook_z", "every head"),
        ("model.layers.3.self_attn.o_proj.input", "an unknown hook point"),
        ("blocks.3.ln2.hook_normalized", "norm's weight"),
        ("blocks.3.hook_mlp_in", "resid_mid, or resid_pre"),
        ("model.layers.3.post_attention_layernorm", "before the MLP on some"),
        ("blocks.x.hook_resid_pre", "an unknown hook point"),
        ("blocks.3.hook_resid_post\n", "an unknown hook point"),
        ("layers.7.experts", "an unknown hook point"),
        ("", "no hook point is named"),
    ],
)
def test_ambiguous_or_unknown_names_have_a_reason_instead_of_a_site(name: str, why: str) -> None:
    site, note = canonical(name, LLAMA)
    assert site == ""
    assert why in note


@pytest.mark.parametrize("point", ["resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"])
def test_every_site_has_a_name_in_transformer_lens(point: str) -> None:
    site = f"layers.11.{point}"
    assert canonical(transformer_lens(site)) == (site, "")
    assert canonical(transformer_lens("embed")) == ("embed", "")


def test_other_strings_have_no_name_in_transformer_lens() -> None:
    assert transformer_lens("") == transformer_lens("layers.3.logits") == ""
