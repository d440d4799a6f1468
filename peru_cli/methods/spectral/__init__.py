"""Methods that merge task vectors as matrices, by their singular values or inner products. They need no data."""
