"""`peru eval`: what a compression or a merge cost, on weights, outputs and tasks."""
