"""Policies: which bind a caller, and what they forbid. Every call passes here on its way to the engine."""
