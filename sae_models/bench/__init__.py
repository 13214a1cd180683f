"""Benchmarks against other people's libraries."""
