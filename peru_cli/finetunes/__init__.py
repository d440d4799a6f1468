"""Every compact form of a fine-tune read as a checkpoint: artifacts, tasks of packs, adapters, heads over a merge."""
