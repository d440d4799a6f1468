"""`peru merge`: one checkpoint out of several."""
