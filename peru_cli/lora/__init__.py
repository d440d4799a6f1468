"""`peru svd-lora`: smaller adapters, and adapters out of full fine-tunes."""
