"""`peru shuffle-pack --method smile`: low-rank experts for every linear layer, among which inputs choose."""
