"""Methods that use statistics of examples, collected in forward or backward passes."""
