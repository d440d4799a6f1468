"""`peru shuffle-pack --method smile|wemoe`: one model of several fine-tunes, in which every input chooses."""
