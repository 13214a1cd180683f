"""Hook points by the names that other libraries give them, and by those of this project.

A canonical name is `embed`, or `layers.L.` and one of resid_pre, attn_out, resid_mid, mlp_in, mlp_out, resid_post.
attn_out and mlp_out are what a branch adds to the residual stream: on sandwich-norm models the output of the norm
behind the branch, not of the branch's module.
"""

import re

MODULES = r"(?:[a-z_]+\.){0,3}(?:layers|h)"
ATTENTION = r"(?:self_attn|attn|attention|self_attention)"
# Models whose layers have a norm behind each branch.
SANDWICH_NORM = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)

# Names as regular expressions; {} in a site is the layer. The first row for a site is the name that is written for it.
TRANSFORMER_LENS = (
    (r"blocks\.(\d+)\.hook_resid_pre", "layers.{}.resid_pre"),
    (r"blocks\.(\d+)\.hook_attn_out", "layers.{}.attn_out"),
    (r"blocks\.(\d+)\.hook_resid_mid", "layers.{}.resid_mid"),
    (r"blocks\.(\d+)\.mlp\.hook_in", "layers.{}.mlp_in"),
    (r"blocks\.(\d+)\.hook_mlp_out", "layers.{}.mlp_out"),
    (r"blocks\.(\d+)\.hook_resid_post", "layers.{}.resid_post"),
    (r"hook_embed", "embed"),
    (r"blocks\.(\d+)\.hook_in", "layers.{}.resid_pre"),
    (r"blocks\.(\d+)\.hook_out", "layers.{}.resid_post"),
)
# Of transformers and sparsify, whose hookpoints are names of modules, and mean their output where they do not say.
HUGGING_FACE = (
    (rf"{MODULES}\.(\d+)\.input", "layers.{}.resid_pre"),
    (rf"{MODULES}\.(\d+)(?:\.output)?", "layers.{}.resid_post"),
    (rf"{MODULES}\.(\d+)\.mlp\.input", "layers.{}.mlp_in"),
    (rf"{MODULES}\.(\d+)\.pre_feedforward_layernorm\.output", "layers.{}.mlp_in"),
    (rf"{MODULES}\.(\d+)\.post_feedforward_layernorm\.output", "layers.{}.mlp_out"),
    (r"(?:[a-z_]+\.){0,3}(?:embed_tokens|embed_in|wte)(?:\.output)?", "embed"),
)
DICTIONARY_LEARNING = ((r"resid_post_layer_?(\d+)", "layers.{}.resid_post"),)
# The module's own output: what the branch adds, but on sandwich-norm models.
BRANCHES = (
    (rf"{MODULES}\.(\d+)\.mlp(?:\.output)?", "layers.{}.mlp_out"),
    (rf"{MODULES}\.(\d+)\.{ATTENTION}(?:\.output)?", "layers.{}.attn_out"),
    (r"blocks\.(\d+)\.mlp\.hook_out", "layers.{}.mlp_out"),
    (r"blocks\.(\d+)\.attn\.hook_out", "layers.{}.attn_out"),
    (r"mlp_out_layer_?(\d+)", "layers.{}.mlp_out"),
    (r"attention_out_layer_?(\d+)", "layers.{}.attn_out"),
)
UNMAPPED = (
    (r"blocks\.\d+\.attn\.hook_z", "the values of every head before the output projection, no site here"),
    (
        r"blocks\.\d+\.ln2\.hook_normalized",
        "with or without the norm's weight, as the model was loaded",
    ),
    (r"blocks\.\d+\.hook_mlp_in", "resid_mid, or resid_pre where the model's branches are parallel"),
    (rf"{MODULES}\.\d+\.post_attention_layernorm.*", "before the MLP on some models, behind the attention on others"),
)


def canonical(name: str, model: str = "") -> tuple[str, str]:
    """(site, note): the canonical name of a hook point, or "" and why there is none.

    `model` is the model's name, where it is known: whether a branch's module gives what the branch adds depends on it.
    """
    for pattern, site in (*TRANSFORMER_LENS, *HUGGING_FACE, *DICTIONARY_LEARNING):
        if found := re.fullmatch(pattern, name):
            return site.format(*found.groups()), ""
    for pattern, site in BRANCHES:
        if found := re.fullmatch(pattern, name):
            return branch(site.format(*found.groups()), name, model)
    for pattern, why in UNMAPPED:
        if re.fullmatch(pattern, name):
            return "", f"{name}: {why}"
    return "", f"{name}: an unknown hook point" if name else "no hook point is named"


def branch(site: str, name: str, model: str) -> tuple[str, str]:
    """(site, note) of the output of an attention or MLP module."""
    if not model:
        return "", f"{name}: {site}, unless the model has a norm behind the branch; it is not named"
    if SANDWICH_NORM.search(model):
        return "", f"{name}: before the norm that {model} has behind the branch, no site here"
    return site, ""


def transformer_lens(site: str) -> str:
    """The name of a canonical site in TransformerLens and SAELens, or "" where it has none."""
    layer = re.match(r"layers\.(\d+)\.", site)
    for pattern, known in TRANSFORMER_LENS:
        if known.format(layer[1] if layer else "") == site:
            return pattern.replace(r"(\d+)", layer[1] if layer else "").replace("\\", "")
    return ""
