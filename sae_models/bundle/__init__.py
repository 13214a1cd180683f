"""Bundles: the artifact from trainer to server."""

from rudder.sae_models.bundle.bundle import (
    FORMAT_VERSION,
    Bundle,
    BundleError,
    Conformance,
    InputNormalisation,
    Manifest,
    Model,
    Source,
    Statistics,
    Training,
    check_model,
    conformance_of,
    describe,
    load,
    model_sha256,
    write,
)
from rudder.sae_models.bundle.catalogue import Catalogue, Context, Latent, Summary, Word

__all__ = [
    "FORMAT_VERSION", "Bundle", "BundleError", "Catalogue", "Conformance", "Context", "InputNormalisation", "Latent",
    "Manifest", "Model", "Source", "Statistics", "Summary", "Training", "Word", "check_model", "conformance_of",
    "describe", "load", "model_sha256", "write",
]  # fmt: skip
