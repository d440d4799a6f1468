"""Passes over a merged task vector, matrix by matrix, after any merge: `--then`."""
