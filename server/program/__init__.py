"""Compile programs, policies and watched rows to bank parameters."""
