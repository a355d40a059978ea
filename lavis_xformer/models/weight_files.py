"""Reads the files of weights that a configuration names, and says in one line what is wrong with them.

Pickled code is never run. Every function takes the key of ``model`` that named the file, for its messages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import download_cached_file
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lavis_xformer.assets import SCHEME
from lavis_xformer.errors import UserError, first_line

#: options of transformers' from_pretrained: report what doesn't fit, other shapes too, which raise by default
REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def load_torch_file(path: str | Path, *, key: str) -> dict[str, Any]:
    """Read tensors from a ``.pth`` file; pickled code is refused.

    Args:
        path: the file.
        key: the configuration key that named it, for messages.

    Raises:
        UserError: there is no such file, it is truncated, or it holds anything but tensors and plain values by name.
    """
    file = _existing(Path(path), key)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training options, as in MAE's files
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"model.{key}: '{file}' is not an intact tensor file (files with pickled code are refused): "
            f"{first_line(error.__context__ or error)}"  # torch's own message advises to load such code
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"model.{key}: '{file}' holds a {type(content).__name__}, not a dict of tensors")
    return content


def load_safetensors(path: Path, *, key: str) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file.

    Args:
        path: the file.
        key: the configuration key that named it, for messages.

    Raises:
        UserError: there is no such file, or it is truncated.
    """
    try:
        return load_file(_existing(path, key))
    except SafetensorError as error:
        raise UserError(f"model.{key}: '{path}' is not an intact tensor file: {error}") from error


def load_json(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON file, such as the configuration beside the weights.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(_existing(path, key).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.{key}: '{path}' is not valid JSON: {error}") from error


def _existing(path: Path, key: str) -> Path:
    if not path.is_file():
        raise UserError(f"model.{key}: there is no file '{path}'")
    return path


def download(url: str, *, key: str) -> str:
    """Fetch a file into torch hub's cache, once on the main process, and return its path.

    Raises:
        UserError: it can't be fetched.
    """
    try:
        return str(download_cached_file(url, check_hash=False, progress=True))
    except OSError as error:
        raise offline_error(url, key, error) from error


def offline_error(name: str, key: str, error: Exception) -> UserError:
    """Say why ``name`` can't be read, or that it can't be fetched; and which key of ``model`` to set."""
    reason = first_line(error)
    if name.startswith(SCHEME) or Path(name).exists():
        return UserError(f"model.{key}: '{name}' can't be read ({reason})")
    return UserError(
        f"model.{key}: '{name}' is not a local path and can't be downloaded ({reason}); set model.{key} to a local copy"
    )
