"""Task vectors: a family of fine-tunes aligned with one base, and the thresholds over them."""
