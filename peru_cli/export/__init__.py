"""`peru export`: write a fine-tune as the weight update that a serving engine reads. `peru_cli.patches` is for engines in this process."""
