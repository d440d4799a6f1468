"""`peru verify`: compare files that peru wrote with the digests in them."""
