"""Run models on examples: data sets, inputs, the models themselves, and metrics."""
