"""SAEs trained on a model that TransformerLens loaded with `center_writing_weights`.

That option removes the mean over the residual stream's width from every weight that writes to it, which changes nothing
that a LayerNorm reads. Vectors of the residual stream, and of the branches that write to it, then are x - mean(x).
TransformerLens leaves models with RMSNorm as they are. https://transformerlensorg.github.io (loading from pretrained)
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from rudder.sae_models.formats import folding
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.sae import SAE

OPTIONS, CENTRING = "model_from_pretrained_kwargs", "center_writing_weights"
# Families of models with RMSNorm, by their names in TransformerLens.
RMS_NORM = re.compile(
    r"gemma|llama|mistral|mixtral|ministral|qwen|qwq|phi-?[34]|deepseek|(^|/)yi-|olmo-?[23]|olmoe|smollm|granite|t5|gpt-oss",
    re.IGNORECASE,
)
# Points whose vectors are written by centred weights; mlp_in is the output of a LayerNorm.
CENTRED_POINTS = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def fold_declared_centring(sae: SAE, declared: Declaration) -> tuple[SAE, Declaration]:
    """Fold the centring that a declaration's notes ask for into the SAE, and name it in `folded`.

    FormatError: the options are not a mapping, or the SAE cannot be centred.
    """
    options = declared.notes.get(OPTIONS, {})
    if not isinstance(options, Mapping):
        raise FormatError(f"{OPTIONS}: {options!r} is not a mapping")
    if not options.get(CENTRING):
        return sae, declared
    if RMS_NORM.search(declared.model):
        return sae, noting(declared, f"not applied: {declared.model} has RMSNorm")
    if not declared.sites or not declared.sites[0].endswith(CENTRED_POINTS):
        return sae, noting(declared, "not applied: the vectors at this hook point are not written by centred weights")
    if declared.output_site and declared.output_site not in declared.sites:
        raise FormatError(f"{CENTRING}: the output of a transcoder that reads a centred stream has no known mean")
    try:
        centred = folding.fold_centring(sae)
    except ValueError as error:
        raise FormatError(f"{CENTRING}: {error}") from error
    noted = noting(declared, "folded into the encoder; the skip connection returns the mean")
    return centred, replace(noted, folded=(*noted.folded, "centring"))


def noting(declared: Declaration, note: str) -> Declaration:
    """Return the declaration with a note on what became of the centring."""
    return replace(declared, notes={**declared.notes, CENTRING: note})
