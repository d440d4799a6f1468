"""`peru prune` to a budget or a quality: mixed artifacts, with one multiplier for all tensors and tasks."""
