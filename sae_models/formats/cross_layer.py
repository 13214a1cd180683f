"""Cross-layer transcoders as circuit-tracer reads them (mntss publishes so), one layer of them, to be watched:
`W_enc_{L}.safetensors`, `W_dec_{L}.safetensors`, `config.yaml`.

    z = x . W_enc_{L} + b_enc_{L}      f = z where z > threshold_{L}, or > 0

W_enc_{L} is [F, d]; W_dec_{L} is [F, layers - L, d], what a latent writes to the output of its own layer and of each
behind it. Only the sum over the latents of all layers up to one reconstructs that layer's output, so what is read here
is partial (sae_models.sae): b_dec_{L} and the part at the latents' own layer are its decoder, and it has no output.
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import matching, one, own_part
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_safetensors, take
from rudder.sae_models.formats.transcoders import declared, threshold
from rudder.sae_models.sae import SAE

ENCODERS, DECODERS = "W_enc_*.safetensors", "W_dec_*.safetensors"


def recognise(path: Path) -> str | None:
    """A file of encoders or of decoders by these names."""
    files = matching(path, ENCODERS) or matching(path, DECODERS)
    return f"{files[0].name} of a cross-layer transcoder" if files else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The latents of one layer: the file of its encoder, beside that of its decoder, or a folder with one layer."""
    file = one(path, ENCODERS)
    layer = re.fullmatch(r"W_enc_(\d+)", file.stem)
    if layer is None:
        raise FormatError(f"{file.name}: no layer in the name, W_enc_0.safetensors would have one")
    beside = file.with_name(f"W_dec_{layer[1]}.safetensors")
    if not beside.is_file():
        raise FormatError(f"{beside.name}: not beside {file.name}")
    w_enc, b_enc, b_dec, w_dec, limit = (
        f"{part}_{layer[1]}" for part in ("W_enc", "b_enc", "b_dec", "W_dec", "threshold")
    )
    found, decoders = read_safetensors(file), read_safetensors(beside)
    only(found, {w_enc, b_enc, b_dec, limit}, file.name)
    only(decoders, {w_dec}, beside.name)
    bias, decoder_bias = take(found, b_enc, file.name, (-1,)), take(found, b_dec, file.name, (-1,))
    encoder = take(found, w_enc, file.name, (len(bias), len(decoder_bias)))
    decoder = own_part(decoders, w_dec, beside.name, 0, (len(bias), len(decoder_bias)))
    limits = threshold(found, (limit,), bias, file.name)
    sae = assembled(encoder, bias, decoder, decoder_bias, limits, partial=True)
    return sae, declared(file, "cross_layer_transcoder", layer[1])


FORMAT = Format("cross_layer", recognise, read)
