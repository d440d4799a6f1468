"""`peru merge`: merge several models into one checkpoint."""
