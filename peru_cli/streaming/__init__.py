"""Tiles: plan, read, compute, commit in order, with a bounded number of buffers. Knows no method."""
