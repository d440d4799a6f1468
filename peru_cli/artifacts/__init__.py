"""peru's file format: the container, the index, the codecs, and one module for each kind of artifact."""
