"""Training of SAEs: configuration, data, training loop, checkpoints, export and report."""
