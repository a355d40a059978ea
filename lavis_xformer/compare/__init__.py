"""``lavis-xformer compare``: several models on the same data, and what the results support."""
