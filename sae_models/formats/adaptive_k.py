"""AdaptiveK (arXiv 2508.17320) as its authors' code saves it: `ae.pt`, `probe.pt` and `dynamic_config.json`.

    z = (x - b_dec) . encoder + bias      f = the k(x) largest z, where above 0      y = f . decoder + b_dec

k(x) comes from the probe, weights [d, 1] and bias [1]: see sae_models.sae.AdaptiveK.
"""

from pathlib import Path

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import declaration, folder, whole
from rudder.sae_models.formats.settings import count, section, word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_json, read_pickle, state, take
from rudder.sae_models.sae import SAE, AdaptiveK

SETTINGS = "dynamic_config.json"
KEYS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"})
PROBE = frozenset({"weights", "bias"})


def recognise(path: Path) -> str | None:
    """The three files."""
    names = ("ae.pt", "probe.pt", SETTINGS)
    return ", ".join(names) if all((folder(path) / name).is_file() for name in names) else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE in a folder; `config.json` beside it may say which model and layer."""
    home = folder(path)
    said = read_json(home / SETTINGS)
    found = state(read_pickle(home / "ae.pt"), "ae.pt")
    probe = state(read_pickle(home / "probe.pt"), "probe.pt")
    only(found, KEYS, "ae.pt")
    only(probe, PROBE, "probe.pt")
    bias, decoder_bias = take(found, "encoder.bias", "ae.pt", (-1,)), take(found, "b_dec", "ae.pt", (-1,))
    latents, width = len(bias), len(decoder_bias)
    encoder = take(found, "encoder.weight", "ae.pt", (latents, width))
    decoder = take(found, "decoder.weight", "ae.pt", (width, latents)).T
    least, most = count(said, "min_k", SETTINGS, latents), count(said, "max_k", SETTINGS, latents)
    if least > most:
        raise FormatError(f"{SETTINGS} min_k: {least} is above max_k, {most}")
    weights, offset = take(probe, "weights", "probe.pt", (width, 1)), take(probe, "bias", "probe.pt", (1,))
    selection = AdaptiveK(weights[:, 0].float(), offset[0].float(), least, most)
    sae = assembled(encoder, bias, decoder, decoder_bias, selection=selection)
    return whole(fold_pre_bias(sae, decoder_bias), "ae.pt"), declared(home)


def declared(home: Path) -> Declaration:
    """What the trainer's `config.json` says, where there is one."""
    settings = home / "config.json"
    trainer = section(read_json(settings), "trainer", settings.name) if settings.is_file() else {}
    layer, notes = trainer.get("layer"), {"submodule": word(trainer, "submodule_name")}
    hook = f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) and not isinstance(layer, bool) else ""
    return declaration("adaptive_k", hook, hook, word(trainer, "lm_name"), folded=("pre_bias",), notes=notes)


FORMAT = Format("adaptive_k", recognise, read)
