"""Methods that interpolate on spheres: what they need of a tensor is inner products."""
