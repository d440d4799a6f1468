"""`peru prune` to a budget or a quality: mixed artifacts, one multiplier for all tensors and tasks."""
