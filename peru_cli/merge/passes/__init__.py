"""The passes of a merge over tensors: tiles of entries, whole matrices, and passes that follow these."""
