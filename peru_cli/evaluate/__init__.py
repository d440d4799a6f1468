"""`peru eval`: measure the cost of a compression or a merge, on weights, outputs and tasks."""
