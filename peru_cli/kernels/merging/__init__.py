"""Loops of merges."""
