"""Checkpoint files on this machine: read in any order, and written whole or not at all."""
