"""Benchmarks: paired comparisons within one run, written as JSON."""
