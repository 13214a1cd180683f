"""Readers, one file per on-disk format of SAEs, and what they have in common.

A reader turns a file or folder into the canonical form (sae_models.sae.SAE) and a declaration of what it says it is.
"""
