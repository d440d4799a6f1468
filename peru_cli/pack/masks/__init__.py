"""`peru shuffle-pack --method *-masks`: one sum of task vectors, and a mask for each task."""
