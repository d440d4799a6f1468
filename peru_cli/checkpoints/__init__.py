"""Where tensors come from and go to: names, headers and bytes, and nothing about methods."""
