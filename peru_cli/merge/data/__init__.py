"""Merges that use examples: statistics of methods with data, and the search for an option's best value."""
