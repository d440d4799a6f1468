"""Fine-tunes swapped in and out of a model in memory: `peru_cli.apply`."""
