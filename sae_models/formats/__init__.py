"""Readers of published SAE formats, one module per format, and their shared parts.

A reader converts a file or folder to the canonical form (sae_models.sae.SAE) and a Declaration of what it claims to be.
"""

from rudder.sae_models.formats.load import load
from rudder.sae_models.formats.source import Declaration, FormatError, Loaded

__all__ = ["Declaration", "FormatError", "Loaded", "load"]
