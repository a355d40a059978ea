"""Importing this module registers our datasets and processors with LAVIS."""

from __future__ import annotations

from lavis_xformer.data import processors

__all__ = ["processors"]
