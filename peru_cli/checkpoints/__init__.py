"""Where tensors come from and go to. Knows files, not methods."""
