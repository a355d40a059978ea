"""X-Former (ECCV 2024) as a plugin for LAVIS 1.0.2.

Importing this package costs next to nothing: torch and LAVIS are imported by :func:`register`, which
``import lavis`` calls by itself where the package is installed (see :mod:`lavis_xformer.autoload`).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from torch import nn

__version__ = "0.1.0"
__all__ = ["__version__", "from_folder", "load_model_and_preprocess", "register"]

# The modules that register names with LAVIS, in the order of their import.
_REGISTERING = (
    "lavis.common.optims",  # its schedules; nothing else imports them
    "lavis.runners",
    "lavis_xformer.models.stage1",
    "lavis_xformer.models.stage2",
    "lavis_xformer.models.matching",
    "lavis_xformer.models.lavis_blip2",
    "lavis_xformer.data.processors",
    "lavis_xformer.data.scene_datasets",
    "lavis_xformer.data.scene_question_datasets",
    "lavis_xformer.data.image_text_datasets",
    "lavis_xformer.data.benchmarks",
    "lavis_xformer.tasks.stage1",
    "lavis_xformer.tasks.stage2",
    "lavis_xformer.tasks.benchmark",
    "lavis_xformer.tasks.gqa",
    "lavis_xformer.tasks.vqa",
    "lavis_xformer.tasks.captions",
    "lavis_xformer.runners.schedules",
    "lavis_xformer.runners.xformer",
)


def register() -> None:
    """Add the models, data, tasks, schedules and runner of this package to LAVIS's registry, and import the user's own.

    May be called any number of times. LAVIS's hard-coded cache folder is replaced by
    :func:`lavis_xformer.paths.cache_folder`; its lists of models and datasets, which are snapshots, are refreshed.
    """
    from importlib import import_module

    from lavis import models
    from lavis.common.registry import registry
    from lavis.datasets import builders

    from lavis_xformer.paths import LAVIS_CACHE, cache_folder, own_modules

    for name in (*_REGISTERING, *own_modules()):
        import_module(name)  # one that isn't there is named
    paths = registry.mapping["paths"]
    if paths["cache_root"] == LAVIS_CACHE:
        paths["cache_root"] = str(cache_folder())
    models.model_zoo.model_zoo = models.ModelZoo().model_zoo
    builders.dataset_zoo.dataset_zoo = builders.DatasetZoo().dataset_zoo


def load_model_and_preprocess(
    name: str, model_type: str | None = None, is_eval: bool = False, device: str = "cpu"
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Load a model and its processors, like LAVIS's function of this name; the type may be left out.

    Args:
        name: a model of LAVIS's registry, such as ``xformer``.
        model_type: one of its types; if left out, the class's ``DEFAULT_MODEL_TYPE`` (``mini``, which runs
            offline, for X-Former's models except T5's, which has none), or its only type.
        is_eval: whether to put the model in eval mode.
        device: where to put it.

    Returns:
        The model, the processors of images and those of texts, each with the keys ``train`` and ``eval``.

    Raises:
        UserError: the model or the type does not exist, or the type is left out and the class names no default.
    """
    register()
    from lavis.models import load_model_and_preprocess as load

    from lavis_xformer.config.load import choose_model_type

    return load(name, choose_model_type(name, model_type), is_eval=is_eval, device=device)


def from_folder(folder: str | Path, *, is_eval: bool = True, device: str = "cpu") -> tuple[nn.Module, Any, Any]:
    """Load a model that ``lavis-xformer export`` wrote; see :func:`lavis_xformer.export.from_folder`."""
    from lavis_xformer import export

    return export.from_folder(folder, is_eval=is_eval, device=device)
