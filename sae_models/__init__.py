"""Sparse autoencoders: their canonical form, their bundles, and the trainer that makes them."""

from pathlib import Path

PRETRAINED = Path(__file__).parent / "pretrained"
