"""Published methods, one file each: pure functions on tensors. Knows no file."""
