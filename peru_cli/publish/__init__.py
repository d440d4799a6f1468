"""`--push` and `peru push`: outputs published on the Hugging Face Hub with a model card."""
