"""`peru inspect`: what a checkpoint, an adapter or an artifact holds."""
