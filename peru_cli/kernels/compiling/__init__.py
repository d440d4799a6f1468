"""How Python loops become machine code: compiled once, in a process beside the command, stored, and loaded again."""
