"""The file format (docs/format.md): container, index, codecs, and one module a kind."""
