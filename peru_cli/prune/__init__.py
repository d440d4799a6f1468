"""`peru prune`: compress fine-tunes to sparse deltas of a base."""
