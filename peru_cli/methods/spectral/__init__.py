"""Methods that merge task vectors as matrices, by their singular values or inner products; no data is needed."""
