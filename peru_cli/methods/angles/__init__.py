"""Methods that interpolate on spheres. They need only inner products of tensors."""
