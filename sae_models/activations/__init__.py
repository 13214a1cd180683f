"""Activations of a model: corpora, hooks, harvest, store and stream."""
