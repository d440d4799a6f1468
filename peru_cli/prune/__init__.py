"""`peru prune`: fine-tunes compressed to sparse deltas of a base."""
