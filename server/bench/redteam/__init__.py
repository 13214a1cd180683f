"""Attacks on a server that policies protect, each with a positive control: the attack without the guard it meets."""
