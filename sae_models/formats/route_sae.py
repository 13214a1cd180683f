"""RouteSAE (arXiv 2503.08200) as its authors' code saves it: one torch file, its settings in its name alone,
`{sum,mean}_hard_K{k}_{model}_{data}_{F}.pt`.

    h = (x - mean) / (std + 1e-6) at each of L sites      p = softmax(router . sum or mean of h over sites)
    the SAE reads p_max * h at the likeliest site: z = (p_max * h - pre_bias) . encoder + latent_bias
    f = the k largest z, where above 0      y = f . decoder + pre_bias

The sites are the outputs of the blocks before hidden states n // 4 to 3 n // 4 of a model with n blocks; L does not
tell n, so no sites are declared.
"""

import re
from dataclasses import replace
from pathlib import Path

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import keys, matching, one, whole
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_pickle, state, take
from rudder.sae_models.sae import SAE, Normalisation, Router, TopK

EPSILON = 1e-6
KEYS = frozenset({"router.weight", "sae.pre_bias", "sae.latent_bias", "sae.encoder.weight", "sae.decoder.weight"})
NAME = re.compile(r"(sum|mean)_(hard|soft)_K(\d+)_(.+)_(\d+)")


def recognise(path: Path) -> str | None:
    """A torch file with a router."""
    files = matching(path, "*.pt")
    return f"{files[0].name} with router.weight" if files and keys(files[0]) == KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The routed SAE in a torch file with the name that it was saved under."""
    file = one(path, "*.pt")
    named = NAME.fullmatch(file.stem)
    if named is None or named[2] == "soft":
        raise FormatError(f"{file.name}: k and routing are in the name, sum_hard_K... or mean_hard_K..., and not soft")
    found = state(read_pickle(file), file.name)
    only(found, KEYS, file.name)
    latent_bias, pre_bias = (take(found, f"sae.{part}_bias", file.name, (-1,)) for part in ("latent", "pre"))
    latents, width, k = len(latent_bias), len(pre_bias), int(named[3])
    if not 1 <= k <= latents:
        raise FormatError(f"{file.name}: {latents} latents, the name says K{k}")
    encoder = take(found, "sae.encoder.weight", file.name, (latents, width))
    decoder = take(found, "sae.decoder.weight", file.name, (width, latents)).T
    router = Router(take(found, "router.weight", file.name, (-1, width)).float(), mean=named[1] == "mean")
    sae = assembled(encoder, latent_bias, decoder, pre_bias, selection=TopK(k), router=router)
    sae = replace(sae, normalisation=Normalisation.LAYER_NORM, epsilon=EPSILON)
    notes = {"sites": len(router.weight), "model": named[4]}
    return whole(fold_pre_bias(sae, pre_bias), file.name), Declaration(
        "route_sae", folded=("pre_bias",), l0=float(k), notes=notes
    )


FORMAT = Format("route_sae", recognise, read)
