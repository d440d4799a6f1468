"""What is looked at before any weight is used: files that are something else, configs, vocabularies, buffers, tensors without a partner."""
