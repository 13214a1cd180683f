"""One layer of a cross-layer transcoder in circuit-tracer's format (published by mntss): `W_enc_{L}.safetensors`,
`W_dec_{L}.safetensors`, `config.yaml`.

    z = x . W_enc_{L} + b_enc_{L}      f = z where z > threshold_{L}, or > 0

W_enc_{L} is [F, d]; W_dec_{L} is [F, layers - L, d], what a latent writes to the output of its own layer and of each
later one. Only the sum over the latents of all layers up to a layer reconstructs that layer's output. So the SAE read
here is partial (sae_models.sae): its decoder is b_dec_{L} and the part at the latents' own layer, and its latents can
be watched but not decoded.
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import decoder_at_layer, matching_files, single_file
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_safetensors, refuse_unknown, take
from rudder.sae_models.formats.transcoders import declared, threshold
from rudder.sae_models.sae import SAE

ENCODERS, DECODERS = "W_enc_*.safetensors", "W_dec_*.safetensors"


def recognise(path: Path) -> str | None:
    """Recognise a file of encoders or decoders by its name."""
    files = matching_files(path, ENCODERS) or matching_files(path, DECODERS)
    return f"{files[0].name} of a cross-layer transcoder" if files else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the latents of one layer from the file of its encoder, its decoder next to it, or from a folder with one."""
    file = single_file(path, ENCODERS)
    layer = re.fullmatch(r"W_enc_(\d+)", file.stem)
    if layer is None:
        raise FormatError(f"{file.name}: no layer in the name, W_enc_0.safetensors would have one")
    decoder_file = file.with_name(f"W_dec_{layer[1]}.safetensors")
    if not decoder_file.is_file():
        raise FormatError(f"{decoder_file.name}: not beside {file.name}")
    w_enc, b_enc, b_dec, w_dec, limit = (
        f"{part}_{layer[1]}" for part in ("W_enc", "b_enc", "b_dec", "W_dec", "threshold")
    )
    tensors, decoders = read_safetensors(file), read_safetensors(decoder_file)
    refuse_unknown(tensors, {w_enc, b_enc, b_dec, limit}, file.name)
    refuse_unknown(decoders, {w_dec}, decoder_file.name)
    bias, decoder_bias = take(tensors, b_enc, file.name, (-1,)), take(tensors, b_dec, file.name, (-1,))
    encoder = take(tensors, w_enc, file.name, (len(bias), len(decoder_bias)))
    decoder = decoder_at_layer(decoders, w_dec, decoder_file.name, 0, (len(bias), len(decoder_bias)))
    limits = threshold(tensors, (limit,), bias, file.name)
    sae = assemble(encoder, bias, decoder, decoder_bias, limits, partial=True)
    return sae, declared(file, "cross_layer_transcoder", layer[1])


FORMAT = Format("cross_layer", recognise, read)
