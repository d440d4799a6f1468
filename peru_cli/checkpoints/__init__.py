"""Where tensors come from and go to: names, headers and bytes. Nothing here knows about methods."""
