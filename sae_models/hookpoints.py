"""Hook points: where in a decoder layer a site `layers.L.POINT` reads and writes vectors."""

import re
from typing import Any

# In the order of a layer's forward pass. resid_mid is the residual stream between attention and MLP.
from rudder.sae_models.errors import UserError

POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
SITE = re.compile(rf"layers\.(\d+)\.({'|'.join(POINTS)})")
FORM = f"layers.<L>.<{'|'.join(POINTS)}>"


def parse(site: str) -> tuple[int, str]:
    """Return (layer, hook point) of a site's name. ValueError: not a site."""
    match = SITE.fullmatch(site)
    if match is None:
        raise UserError(f"site: {site!r} is not {FORM}")
    return int(match[1]), match[2]


def has_resid_mid(layer: Any) -> bool:
    """Return whether a layer has a residual stream between attention and MLP, that is, whether its MLP reads it.

    False for parallel branches, which both read the layer's input (GPT-NeoX, GPT-J, Phi, Falcon, Cohere), and for
    post-norm layers, which normalise the stream after each branch (BERT, OPT 350M).
    """
    config = getattr(layer, "config", None)
    parallel = getattr(layer, "use_parallel_residual", False) or getattr(config, "parallel_attn", False)
    norms = [name for name, module in layer.named_children() if "norm" in type(module).__name__.lower()]
    return not parallel and len(norms) > 1 and getattr(layer, "do_layer_norm_before", True)
