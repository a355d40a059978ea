"""Builders, datasets and processors that LAVIS lacks."""
