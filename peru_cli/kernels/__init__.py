"""Loops over tiles, compiled for this processor: the operations that methods share, on NumPy arrays."""
