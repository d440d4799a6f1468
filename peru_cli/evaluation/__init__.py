"""Tasks, metrics and plots."""
