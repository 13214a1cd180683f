"""Benchmarks against other SAE training libraries."""
