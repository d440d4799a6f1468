"""The search for the best values of a merge's options: on examples, or by a command that prints a number."""
