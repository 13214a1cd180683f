"""Output and input scores of a bundle's latents, written into its catalogue."""

from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from rudder.sae_models.activations import harvest, samples
from rudder.sae_models.analysis.candidates import scores_of
from rudder.sae_models.analysis.sampling import Voice
from rudder.sae_models.bundle import bundle, revision
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.catalogue import Latent
from rudder.sae_models.errors import UserError

LATENTS_PER_PASS = 256


def score_bundle(path: Path, model: Path) -> int:
    """Write the scores of all latents into the catalogue of a bundle; return how many there are.

    UserError: the SAE does not write to the site that it reads. BundleError: it is damaged or of another model.
    """
    old = bundle.load(path)
    bundle.check_model(old, bundle.model_sha256(model), samples.read_model_shape(model).hidden_size)
    if old.manifest.transcodes or old.manifest.partial or old.sae.router:
        raise UserError(f"{path}: only an SAE that writes to the site that it reads can steer")
    latents = scored_latents(old, Voice(harvest.load_model(model), harvest.load_tokenizer(model)))
    revision.write(old, latents, old.measured).catalogue.close()
    return len(latents)


def scored_latents(old: Bundle, voice: Voice) -> list[Latent]:
    """Return the catalogue's entries with their scores."""
    result = list[Latent]()
    for start in tqdm(range(0, old.manifest.latents, LATENTS_PER_PASS), desc="scores", unit="pass"):
        part = range(start, min(start + LATENTS_PER_PASS, old.manifest.latents))
        scores = scores_of(voice, old, part)
        for entry in map(old.catalogue.get, part):
            index = entry.summary.index
            summary = replace(entry.summary, output_score=scores.output[index], input_score=scores.input[index])
            result.append(replace(entry, summary=summary))
    return result
