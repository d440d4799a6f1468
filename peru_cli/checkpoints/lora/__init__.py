"""LoRA adapters: their configs and keys, the updates they represent, and writing them."""
