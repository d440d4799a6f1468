"""Weights stored as codes and scales: recognise the scheme, and dequantise FP8 while it is read."""
