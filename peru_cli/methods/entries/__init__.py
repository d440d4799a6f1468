"""Methods that decide entry by entry, or by the entries of a row or tensor."""
