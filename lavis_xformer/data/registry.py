"""Importing this module registers our datasets and processors with LAVIS."""

from __future__ import annotations

from lavis_xformer.data import processors, scene_datasets

__all__ = ["processors", "scene_datasets"]
