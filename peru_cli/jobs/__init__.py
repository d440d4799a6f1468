"""What a command does, free of the command line: checkpoints, methods and artifacts put together."""
