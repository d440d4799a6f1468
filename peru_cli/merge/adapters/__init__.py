"""`peru merge --lora`: LoRA adapters merged into one adapter, in common coordinates of their factors."""
