"""peru's file format: the container, the index, codecs, and one module for each kind of artifact."""
