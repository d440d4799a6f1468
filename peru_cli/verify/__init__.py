"""`peru verify`: what peru wrote, compared with the digests that it carries."""
