"""Models on the Hugging Face Hub: which files a repo holds, downloads into the shared cache, and reads by range."""
