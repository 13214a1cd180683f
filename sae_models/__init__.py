"""Sparse autoencoders: canonical form, published formats, bundles, training and evaluation.

Public imports; everything else is internal:

    rudder.sae_models                          PRETRAINED
    rudder.sae_models.sae                      SAE, Normalisation, Router, TopK, GroupMax, AdaptiveK
    rudder.sae_models.fidelity                 Fidelity, measure, fvu, l0
    rudder.sae_models.bundle                   Bundle, load, write, describe, check_model, model_sha256, BundleError,
                                               Manifest, Statistics, Conformance, Catalogue, Latent, Summary
    rudder.sae_models.formats                  load, Loaded, Declaration, FormatError
    rudder.sae_models.importing                import_sae, ImportRequest, ImportResult, ImportRefused, check_bundle
    rudder.sae_models.evaluation.splicing      splice, losses
    rudder.sae_models.analysis.compare         match, compare
"""

from pathlib import Path

PRETRAINED = Path(__file__).parent / "pretrained"
