"""Where things are: the shipped configurations, the user's cache folder, what a model is built of and starts from.

In a clone, ``configs/`` and ``projects/`` lie beside the package; in an installed copy they lie inside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_xformer.errors import UserError, nearest

CACHE_VARIABLE = "LAVIS_XFORMER_CACHE"
OWN_MODULES_VARIABLE = "LAVIS_XFORMER_IMPORT"
LAVIS_CACHE = "/export/home/.cache/lavis"  # hard-coded in LAVIS 1.0.2
_PACKAGE = Path(__file__).resolve().parent


def own_modules() -> list[str]:
    """Return the names of the user's own modules, ``$LAVIS_XFORMER_IMPORT``, which register with LAVIS."""
    return [name for name in re.split(r"[,\s]+", os.environ.get(OWN_MODULES_VARIABLE, "")) if name]


def shipped_folder(name: str) -> Path:
    """Return the shipped folder ``configs``, ``projects`` or ``docs``."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def run_keys_table() -> Path:
    """Return the page that explains the keys of ``run:``."""
    return shipped_folder("docs") / "engine.md"


def config_path(relative: str) -> str:
    """Return the absolute path of a default configuration below ``configs/``, such as ``models/xformer_mini.yaml``.

    LAVIS joins the paths of its class attributes to its own folder, which leaves absolute paths unchanged.
    """
    return str(shipped_folder("configs") / relative)


def type_path(model: Any, model_type: str) -> str:
    """Return the path of the YAML of a model type, as LAVIS's ``default_config_path`` does.

    Raises:
        UserError: the class has no such type.
    """
    types: dict[str, str] = model.PRETRAINED_MODEL_CONFIG_DICT
    if model_type not in types:
        raise UserError(f"model_type: {model.__name__} has no '{model_type}'; {nearest(model_type, types)}")
    return config_path(types[model_type])


def project_path(path: str) -> Path:
    """Find a run's YAML: the path as given, or else below the shipped ``projects/`` folder.

    So ``--cfg-path projects/xformer/pretrain.yaml`` works from any folder.

    Raises:
        UserError: there is no such file.
    """
    if Path(path).is_file():
        return Path(path)
    projects = shipped_folder("projects")
    shipped = projects.parent / path
    if shipped.is_file() and projects in shipped.parents:
        return shipped
    if path and Path(path).exists():
        raise UserError(f"'{path}' is no regular file; give a YAML file")
    known = [str(file.relative_to(projects.parent)) for file in projects.rglob("*.yaml")]
    raise UserError(
        f"'{path}': there is no such file here ({Path.cwd()}), nor among the shipped ones; {nearest(path, known)}"
    )


def cache_folder() -> Path:
    """Return the folder for downloads and rendered data.

    It is ``$LAVIS_XFORMER_CACHE``, else ``$XDG_CACHE_HOME/lavis-xformer``, else ``~/.cache/lavis-xformer``;
    never :data:`LAVIS_CACHE`. The folder is not created.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "lavis-xformer"


#: keys of ``model`` that name parts: local folders or files, shipped ones, or models of a hub
PARTS = ("vit_model", "vit_weights", "bert", "mae_model", "opt_model", "t5_model")


def checkpoints_of(model: Mapping[str, Any]) -> dict[str, str]:
    """The checkpoints that a ``model`` configuration loads, in this order, by the keys that name them."""
    if not model.get("load_pretrained", True):
        return {}
    own = "finetuned" if model.get("load_finetuned", False) else "pretrained"
    return {key: model[key] for key in ("blip2_pretrained", own) if model.get(key)}
