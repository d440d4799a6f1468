"""The published methods as pure functions on arrays. Nothing here knows about files."""
