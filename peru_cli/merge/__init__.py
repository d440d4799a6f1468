"""`peru merge`: one checkpoint from several."""
