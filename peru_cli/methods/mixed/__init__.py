"""Task vectors at the least error for their bytes: low rank with a precision for each direction, quantised differences, one multiplier."""
