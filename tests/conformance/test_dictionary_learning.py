"""Checkpoints of dictionary_learning's trainers encode and decode like in the library."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionary_learning.dictionary import AutoEncoderNew, Dictionary
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedAnnealTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    PAnnealTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from torch import Tensor

from rudder.sae_models.formats import dictionary_learning
from rudder.sae_models.formats.load import load
from rudder.sae_models.sae import SAE, TopK
from tests.conformance.agreement import D, F, K, assert_agrees, assert_close, fill

TRAINERS = [
    StandardTrainer,
    StandardTrainerAprilUpdate,
    PAnnealTrainer,
    GatedSAETrainer,
    GatedAnnealTrainer,
    JumpReluTrainer,
    TopKTrainer,
    BatchTopKTrainer,
    MatryoshkaBatchTopKTrainer,
]
OPTIONS = {
    "steps": 4, "activation_dim": D, "dict_size": F, "layer": 2, "lm_name": "textbook-lm", "device": "cpu",
    "submodule_name": "resid_post_layer_2", "k": K, "group_fractions": [0.25, 0.75], "warmup_steps": 1,
    "sparsity_warmup_steps": 2, "anneal_start": 1, "anneal_end": 3,
}  # fmt: skip


def options(trainer: Any) -> dict[str, Any]:
    """Return the OPTIONS that a trainer accepts."""
    return {key: value for key, value in OPTIONS.items() if key in inspect.signature(trainer).parameters}


def save(path: Path, autoencoder: Any, config: dict[str, Any]) -> None:
    """Write the two files like the library's trainSAE."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 64}}))
    torch.save({key: value.cpu() for key, value in autoencoder.state_dict().items()}, path / "ae.pt")


def save_random(trainer_class: Any, path: Path, threshold: float = 8.0) -> Any:
    """Save a dictionary with random weights and its trainer's configuration; return it as the library loads it."""
    trainer = trainer_class(**options(trainer_class))
    fill(trainer.ae)
    if hasattr(trainer.ae, "k"):
        trainer.ae.threshold.fill_(threshold)
    save(path, trainer.ae, trainer.config)
    return load_dictionary(str(path), "cpu")[0]


def run(theirs: Any, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the library's latents and output."""
    with torch.no_grad():
        latents = theirs.encode(x, **options)
        return latents, theirs.decode(latents)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_dictionaries_agree(trainer: Any, x: Tensor, tmp_path: Path) -> None:
    theirs = save_random(trainer, tmp_path / "sae")
    loaded = load(tmp_path / "sae")
    assert loaded.format == "dictionary_learning"
    assert loaded.declared.architecture == type(theirs).__name__
    named = ("layers.2.resid_post",) if "submodule_name" in options(trainer) else ()
    assert (loaded.declared.sites, loaded.declared.model) == (named, "textbook-lm")
    assert_agrees(loaded.sae, x, *run(theirs, x))


def test_april_autoencoder_has_no_pre_bias(x: Tensor, tmp_path: Path) -> None:
    theirs = AutoEncoderNew(D, F)
    fill(theirs)
    save(tmp_path / "sae", theirs, {"dict_class": "AutoEncoderNew"})
    theirs, _ = load_dictionary(str(tmp_path / "sae"), "cpu")
    assert_agrees(load(tmp_path / "sae").sae, x, *run(theirs, x))


def test_topk_by_its_learned_threshold_agrees(x: Tensor, tmp_path: Path) -> None:
    theirs, loaded = save_random(TopKTrainer, tmp_path / "sae"), load(tmp_path / "sae")
    sae = loaded.sae
    assert sae.selection == TopK(K)
    by_threshold = SAE(
        sae.encoder, sae.bias, torch.full((F,), loaded.declared.notes["threshold"]), sae.decoder, sae.decoder_bias
    )
    assert_agrees(by_threshold, x, *run(theirs, x, use_threshold=True))


@pytest.mark.parametrize("trainer", [BatchTopKTrainer, MatryoshkaBatchTopKTrainer])
def test_without_a_learned_threshold_the_library_applies_relu(trainer: Any, x: Tensor, tmp_path: Path) -> None:
    theirs, loaded = save_random(trainer, tmp_path / "sae", threshold=-1.0), load(tmp_path / "sae")
    assert loaded.declared.notes["threshold"] == "never learned"
    assert_agrees(loaded.sae, x, *run(theirs, x))


@pytest.mark.parametrize("normalised", [True, False])
def test_saes_saved_by_a_training_run_agree(normalised: bool, x: Tensor, tmp_path: Path) -> None:
    configs = [{"trainer": kind, **options(kind)} for kind in TRAINERS]
    batches = [x[i : i + 24].clone() for i in range(0, len(x), 24)] * 2
    trainSAE(batches, configs, steps=4, save_dir=str(tmp_path), device="cpu", normalize_activations=normalised)
    for i in range(len(TRAINERS)):
        folder = tmp_path / f"trainer_{i}"
        assert "norm_factor" not in json.loads((folder / "config.json").read_text())["trainer"]
        theirs, _ = load_dictionary(str(folder), "cpu")
        assert_agrees(load(folder).sae, x, *run(theirs, x))


def test_every_dictionary_class_is_read_or_refused() -> None:
    theirs = {kind.__name__ for kind in Dictionary.__subclasses__()}
    assert theirs <= set(dictionary_learning.LAYOUTS) | set(dictionary_learning.REFUSED)
    assert theirs >= set(dictionary_learning.LAYOUTS)


# Known defects of dictionary_learning 0.1.


def test_library_reports_activations_times_norms_only_with_outputs(x: Tensor) -> None:
    theirs = AutoEncoderNew(D, F)
    fill(theirs)
    with torch.no_grad():
        _, reported = theirs(x, output_features=True)
        norm = theirs.decoder.weight.norm(dim=0)
        assert_close(reported / norm, theirs.encode(x))
        assert float((reported - theirs.encode(x)).abs().max()) > 0.1


def test_library_rescales_a_plain_autoencoder_on_loading(x: Tensor, tmp_path: Path) -> None:
    theirs = save_random(StandardTrainer, tmp_path / "sae")
    stored = torch.load(tmp_path / "sae" / "ae.pt")
    norm = stored["decoder.weight"].norm(dim=0)
    with torch.no_grad():
        raw = torch.relu((x - stored["bias"]) @ stored["encoder.weight"].T + stored["encoder.bias"])
        assert_close(theirs.encode(x), raw * norm)
    assert load(tmp_path / "sae").declared.folded == ("pre_bias", "decoder_norm")
