"""Under which names, and in which form, the tensors of one model meet those of another."""
