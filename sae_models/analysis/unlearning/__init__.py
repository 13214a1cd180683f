"""Unlearning studies: how much of a topic a model still shows under a program, and what that costs elsewhere."""
