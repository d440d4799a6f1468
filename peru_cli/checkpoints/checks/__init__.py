"""Checks before any weight is used: file types, configs, vocabularies, buffers, unpaired tensors."""
