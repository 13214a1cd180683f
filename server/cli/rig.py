"""A model, its twin, a bundle and a topic: arguments of `rudder eval unlearning` and `rudder policy derive`."""

import argparse
from pathlib import Path

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import harvest
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.unlearning.rig import Rig
from rudder.sae_models.bundle import bundle
from rudder.server.cli.program import load_twin

FOLDERS = {
    "--model": ("textbook-lm", "folder of the model"),
    "--twin": ("textbook-lm-twin", "folder of the same model trained without the topic"),
    "--bundle": ("textbook-lm-layers.2", "folder of an SAE bundle of the model"),
}


def add_rig(parser: argparse.ArgumentParser) -> None:
    """Add the folders of a rig."""
    for name, (default, text) in FOLDERS.items():
        parser.add_argument(name, type=Path, default=PRETRAINED / default, help=f"{text} (that of the demo)")


def rig_of(args: argparse.Namespace) -> Rig:
    """Load a rig. UserError: its parts do not fit."""
    loaded, model = bundle.load(args.bundle), harvest.load_model(args.model)
    bundle.check_model(loaded, bundle.model_sha256(args.model), model.config.hidden_size)
    return Rig(model, load_twin(args.twin, args.model), harvest.load_tokenizer(args.model), loaded)


def topic_of(args: argparse.Namespace) -> Topic:
    """Return the topic and its neighbours."""
    return Topic(tuple(args.topic), tuple(args.neighbours))
