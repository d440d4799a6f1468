"""Read every compact form of a fine-tune as a checkpoint: artifacts, tasks of packs, adapters, heads on a merge."""
