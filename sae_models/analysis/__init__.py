"""Studies with SAEs: comparing dictionaries, selecting latents, deriving and evaluating programs."""
