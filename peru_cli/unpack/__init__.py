"""`peru unpack`: a fine-tune rebuilt from its base and an artifact, adapter or pack."""
