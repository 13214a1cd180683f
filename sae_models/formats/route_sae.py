"""RouteSAE (arXiv 2503.08200) as saved by its authors' code: a torch file whose name holds the settings,
`{sum,mean}_hard_K{k}_{model}_{data}_{F}.pt`.

    h = (x - mean) / (std + 1e-6) at each of L sites      p = softmax(router . sum or mean of h over sites)
    the SAE reads p_max * h at the likeliest site: z = (p_max * h - pre_bias) . encoder + latent_bias
    f = the k largest z, where above 0      y = f . decoder + pre_bias

The sites are the outputs of the blocks before hidden states n // 4 to 3 n // 4 of a model with n blocks. L does not
determine n, so the declaration has no sites.
"""

import re
from dataclasses import replace
from pathlib import Path

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import check_finite, matching_files, single_file, tensor_names
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_pickle, refuse_unknown, state_dict, take
from rudder.sae_models.sae import SAE, Normalisation, Router, TopK

EPSILON = 1e-6
KEYS = frozenset({"router.weight", "sae.pre_bias", "sae.latent_bias", "sae.encoder.weight", "sae.decoder.weight"})
NAME = re.compile(r"(sum|mean)_(hard|soft)_K(\d+)_(.+)_(\d+)")


def recognise(path: Path) -> str | None:
    """Recognise a torch file with a router."""
    files = matching_files(path, "*.pt")
    return f"{files[0].name} with router.weight" if files and tensor_names(files[0]) == KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the routed SAE in a torch file that still has its original name."""
    file = single_file(path, "*.pt")
    named = NAME.fullmatch(file.stem)
    if named is None or named[2] == "soft":
        raise FormatError(f"{file.name}: k and routing are in the name, sum_hard_K... or mean_hard_K..., and not soft")
    tensors = state_dict(read_pickle(file), file.name)
    refuse_unknown(tensors, KEYS, file.name)
    latent_bias, pre_bias = (take(tensors, f"sae.{part}_bias", file.name, (-1,)) for part in ("latent", "pre"))
    latents, width, k = len(latent_bias), len(pre_bias), int(named[3])
    if not 1 <= k <= latents:
        raise FormatError(f"{file.name}: {latents} latents, the name says K{k}")
    encoder = take(tensors, "sae.encoder.weight", file.name, (latents, width))
    decoder = take(tensors, "sae.decoder.weight", file.name, (width, latents)).T
    router = Router(take(tensors, "router.weight", file.name, (-1, width)).float(), mean=named[1] == "mean")
    sae = assemble(encoder, latent_bias, decoder, pre_bias, selection=TopK(k), router=router)
    sae = replace(sae, normalisation=Normalisation.LAYER_NORM, epsilon=EPSILON)
    notes = {"sites": len(router.weight), "model": named[4]}
    return check_finite(fold_pre_bias(sae, pre_bias), file.name), Declaration(
        "route_sae", folded=("pre_bias",), l0=float(k), notes=notes
    )


FORMAT = Format("route_sae", recognise, read)
