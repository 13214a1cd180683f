"""Where in a layer vectors are read and written: the points of a site `layers.L.POINT`."""

import re
from typing import Any

from rudder.sae_models.errors import UserError

# In the order in which a layer's forward pass reaches them. resid_mid is the residual stream between the branches.
POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
SITE = re.compile(rf"layers\.(\d+)\.({'|'.join(POINTS)})")
FORM = f"layers.<L>.<{'|'.join(POINTS)}>"


def parse(site: str) -> tuple[int, str]:
    """(layer, point) of a site's name. ValueError: it is none."""
    match = SITE.fullmatch(site)
    if match is None:
        raise UserError(f"site: {site!r} is not {FORM}")
    return int(match[1]), match[2]


def has_middle(layer: Any) -> bool:
    """Whether a layer's MLP reads what its attention wrote, so that there is a residual stream between them.

    Not where both read the layer's input (GPT-NeoX, GPT-J, Phi, Falcon, Cohere), nor where the stream is normalised
    behind each branch (BERT, OPT 350M).
    """
    settings = getattr(layer, "config", None)
    at_once = getattr(layer, "use_parallel_residual", False) or getattr(settings, "parallel_attn", False)
    norms = [name for name, module in layer.named_children() if "norm" in type(module).__name__.lower()]
    return not at_once and len(norms) > 1 and getattr(layer, "do_layer_norm_before", True)
