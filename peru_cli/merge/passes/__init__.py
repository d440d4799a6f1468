"""What a merge does to tensors: tiles of entries, whole matrices, and what follows on these."""
