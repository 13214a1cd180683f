"""AdaptiveK (arXiv 2508.17320) as saved by its authors' code: `ae.pt`, `probe.pt` and `dynamic_config.json`.

    z = (x - b_dec) . encoder + bias      f = the k(x) largest z, where above 0      y = f . decoder + b_dec

The probe, weights [d, 1] and bias [1], gives k(x): see sae_models.sae.AdaptiveK.
"""

from pathlib import Path

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import check_finite, checkpoint_folder, declaration
from rudder.sae_models.formats.settings import count, name_of, section
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_json, read_pickle, refuse_unknown, state_dict, take
from rudder.sae_models.sae import SAE, AdaptiveK

SETTINGS = "dynamic_config.json"
KEYS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"})
PROBE = frozenset({"weights", "bias"})


def recognise(path: Path) -> str | None:
    """Recognise the three files."""
    names = ("ae.pt", "probe.pt", SETTINGS)
    return ", ".join(names) if all((checkpoint_folder(path) / name).is_file() for name in names) else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE in a folder; a `config.json` beside it may declare the model and layer."""
    home = checkpoint_folder(path)
    settings = read_json(home / SETTINGS)
    tensors = state_dict(read_pickle(home / "ae.pt"), "ae.pt")
    probe = state_dict(read_pickle(home / "probe.pt"), "probe.pt")
    refuse_unknown(tensors, KEYS, "ae.pt")
    refuse_unknown(probe, PROBE, "probe.pt")
    bias, decoder_bias = take(tensors, "encoder.bias", "ae.pt", (-1,)), take(tensors, "b_dec", "ae.pt", (-1,))
    latents, width = len(bias), len(decoder_bias)
    encoder = take(tensors, "encoder.weight", "ae.pt", (latents, width))
    decoder = take(tensors, "decoder.weight", "ae.pt", (width, latents)).T
    k_min, k_max = count(settings, "min_k", SETTINGS, latents), count(settings, "max_k", SETTINGS, latents)
    if k_min > k_max:
        raise FormatError(f"{SETTINGS} min_k: {k_min} is above max_k, {k_max}")
    weights, offset = take(probe, "weights", "probe.pt", (width, 1)), take(probe, "bias", "probe.pt", (1,))
    selection = AdaptiveK(weights[:, 0].float(), offset[0].float(), k_min, k_max)
    sae = assemble(encoder, bias, decoder, decoder_bias, selection=selection)
    return check_finite(fold_pre_bias(sae, decoder_bias), "ae.pt"), declared(home)


def declared(home: Path) -> Declaration:
    """Return the declaration in the trainer's `config.json`, if there is one."""
    config = home / "config.json"
    trainer = section(read_json(config), "trainer", config.name) if config.is_file() else {}
    layer, notes = trainer.get("layer"), {"submodule": name_of(trainer, "submodule_name")}
    hook = f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) and not isinstance(layer, bool) else ""
    return declaration("adaptive_k", hook, hook, name_of(trainer, "lm_name"), folded=("pre_bias",), notes=notes)


FORMAT = Format("adaptive_k", recognise, read)
