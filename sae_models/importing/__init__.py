"""Bundles from SAEs that others trained."""
