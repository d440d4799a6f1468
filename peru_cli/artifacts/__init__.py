"""peru's file format: the container, the index, the codecs, and one module per kind of artifact."""
