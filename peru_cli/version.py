"""The version of peru, which its outputs record."""

__version__ = "0.1.0"
