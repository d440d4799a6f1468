"""Models run on examples: data sets, inputs, the models themselves, and metrics."""
