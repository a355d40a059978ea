"""``lavis-xformer compare``: several models on the same data, and what may be said about them."""
