"""Readers of the formats, written from their documents alone."""
