"""Task vectors: a family of fine-tunes aligned with one base, and thresholds over them."""
