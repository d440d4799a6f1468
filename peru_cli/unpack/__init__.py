"""`peru unpack`: rebuild a fine-tune from its base and an artifact, adapter or pack."""
