"""LoRA adapters: their configuration and keys, the updates they stand for, and writing them."""
