"""Importing this module registers X-Former's models with LAVIS."""

from lavis_xformer.models.stage1 import XFormer

__all__ = ["XFormer"]
