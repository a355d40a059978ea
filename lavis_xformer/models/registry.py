"""Importing this module registers X-Former's models with LAVIS."""

from lavis_xformer.models.lavis_blip2 import LavisBlip2, LavisBlip2OPT
from lavis_xformer.models.matching import XFormerITM
from lavis_xformer.models.stage1 import XFormer
from lavis_xformer.models.stage2 import XFormerOPT, XFormerT5

__all__ = ["LavisBlip2", "LavisBlip2OPT", "XFormer", "XFormerITM", "XFormerOPT", "XFormerT5"]
