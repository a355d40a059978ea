"""Importing this module registers our datasets and processors with LAVIS."""

from __future__ import annotations

from lavis_xformer.data import benchmarks, image_text_datasets, processors, scene_datasets, scene_question_datasets

__all__ = ["benchmarks", "image_text_datasets", "processors", "scene_datasets", "scene_question_datasets"]
