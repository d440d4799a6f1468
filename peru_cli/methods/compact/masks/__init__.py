"""Which entries of a vector that all tasks share a task uses: one file a method, and their table."""
