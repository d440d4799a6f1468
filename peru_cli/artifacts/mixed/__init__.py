"""Artifacts of kind `mixed`: each tensor in the coding that makes the best use of its bytes (docs/mixed.md)."""
