"""Sparse operations on the activations of a batch, their kernels, collectives, and top-k screening."""
