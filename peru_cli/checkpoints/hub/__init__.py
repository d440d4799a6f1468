"""Models on the Hugging Face Hub: the files of a repo, downloads into the shared cache, and reads by range."""
