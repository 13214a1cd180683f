"""Evaluation of SAEs and their latents: splicing, logit lens, sparse probing, activity, labels."""
