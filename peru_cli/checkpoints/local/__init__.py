"""Checkpoint files on this machine: reading them in any order, and writing them whole or not at all."""
