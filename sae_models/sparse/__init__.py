"""Sparse operations on the latents of a batch, their kernels and collectives."""
