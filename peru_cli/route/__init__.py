"""`peru route`: which fine-tune should answer an input."""
