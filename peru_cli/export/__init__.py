"""`peru export`: a fine-tune as the weight update that a serving engine reads; `peru_cli.patches` for engines in the same process."""
