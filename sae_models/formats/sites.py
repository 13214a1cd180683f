"""Translate hook points of other libraries to this project's sites, and back.

A site is `embed`, or `layers.L.` and one of resid_pre, attn_out, resid_mid, mlp_in, mlp_out, resid_post. attn_out and
mlp_out are what a branch adds to the residual stream: on sandwich-norm models the output of the norm after the branch,
not of the branch's module.
"""

import re

MODULES = r"(?:[a-z_]+\.){0,3}(?:layers|h)"
ATTENTION = r"(?:self_attn|attn|attention|self_attention)"
# Models with a norm after each branch.
SANDWICH_NORM = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)

# (name as a regular expression, site with {} for the layer). The first entry for a site is the name written for it.
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
# transformers and sparsify name hook points by modules, and mean the module's output unless they say otherwise.
HUGGING_FACE = (
    (rf"{MODULES}\.(\d+)\.input", "layers.{}.resid_pre"),
    (rf"{MODULES}\.(\d+)(?:\.output)?", "layers.{}.resid_post"),
    (rf"{MODULES}\.(\d+)\.mlp\.input", "layers.{}.mlp_in"),
    (rf"{MODULES}\.(\d+)\.pre_feedforward_layernorm\.output", "layers.{}.mlp_in"),
    (rf"{MODULES}\.(\d+)\.post_feedforward_layernorm\.output", "layers.{}.mlp_out"),
    (r"(?:[a-z_]+\.){0,3}(?:embed_tokens|embed_in|wte)(?:\.output)?", "embed"),
)
DICTIONARY_LEARNING = ((r"resid_post_layer_?(\d+)", "layers.{}.resid_post"),)
# The module's own output, which is what the branch adds except on sandwich-norm models.
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
    (rf"{MODULES}\.\d+\.post_attention_layernorm.*", "before the MLP on some models, after the attention on others"),
)


def canonical(name: str, model: str = "") -> tuple[str, str]:
    """Return (site, "") of a hook point, or ("", the reason why it has none).

    `model` is the model's name if known: it determines whether the output of a branch's module is what the branch adds.
    """
    for pattern, site in (*TRANSFORMER_LENS, *HUGGING_FACE, *DICTIONARY_LEARNING):
        if match := re.fullmatch(pattern, name):
            return site.format(*match.groups()), ""
    for pattern, site in BRANCHES:
        if match := re.fullmatch(pattern, name):
            return branch(site.format(*match.groups()), name, model)
    for pattern, why in UNMAPPED:
        if re.fullmatch(pattern, name):
            return "", f"{name}: {why}"
    return "", f"{name}: an unknown hook point" if name else "no hook point is named"


def branch(site: str, name: str, model: str) -> tuple[str, str]:
    """Return (site, reason) like `canonical`, for the output of an attention or MLP module."""
    if not model:
        return "", f"{name}: {site}, unless the model has a norm after the branch; the model is not named"
    if SANDWICH_NORM.search(model):
        return "", f"{name}: before the norm that {model} has after the branch, no site here"
    return site, ""


def transformer_lens(site: str) -> str:
    """Return the name of a site in TransformerLens and SAELens, or "" if it has none."""
    layer = re.match(r"layers\.(\d+)\.", site)
    for pattern, known in TRANSFORMER_LENS:
        if known.format(layer[1] if layer else "") == site:
            return pattern.replace(r"(\d+)", layer[1] if layer else "").replace("\\", "")
    return ""
