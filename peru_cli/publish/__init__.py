"""`--push` and `peru push`: publish outputs on the Hugging Face Hub with a model card."""
