"""Weights stored as codes with scales beside them: what is recognised, and FP8 turned back into floats while it is read."""
