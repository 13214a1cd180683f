"""Activations of a model: corpus, hooks, harvest, store, stream and samples."""
