"""Loops over tiles that are compiled for this processor: the verbs that methods share, on NumPy arrays."""
