"""`peru inspect`: show what a checkpoint, an adapter or an artifact holds."""
