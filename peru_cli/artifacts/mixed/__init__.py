"""Artifacts of kind `mixed`: each tensor in the representation that its bytes are best spent on (docs/mixed.md)."""
