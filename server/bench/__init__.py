"""Benchmarks: each a paired comparison in one run, written as JSON."""
