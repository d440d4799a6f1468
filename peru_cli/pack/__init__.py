"""`peru shuffle-pack`: several fine-tunes in the space of one."""
