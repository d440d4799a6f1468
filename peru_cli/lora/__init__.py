"""`peru svd-lora`: smaller adapters, and adapters from full fine-tunes."""
