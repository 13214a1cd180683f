"""The engine process: the bank in the model, and what drives it."""
