"""The version of peru, as its outputs record it."""

__version__ = "0.1.0"
