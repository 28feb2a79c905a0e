"""Numbers from images: what a classifier reads in them, and how their distribution compares with another."""
