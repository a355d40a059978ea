"""A batch, as LAVIS's collaters make it: a mapping of tensors and lists, a value for each of B samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(samples: Any, device: torch.device) -> Any:
    """Move every tensor in nested dicts and lists to ``device``."""
    if isinstance(samples, Tensor):
        return samples.to(device, non_blocking=True)
    if isinstance(samples, Mapping):
        return {key: to_device(value, device) for key, value in samples.items()}
    if isinstance(samples, list):
        return [to_device(value, device) for value in samples]
    return samples


def count_samples(samples: Mapping[str, Any]) -> int:
    """Return the batch size of samples: the length of the images, or else of the first entry."""
    first = samples["image"] if "image" in samples else next(iter(samples.values()))
    return len(first)


def image_ids(samples: Mapping[str, Any]) -> list[Any]:
    """Return the paths or ids of a batch's images as plain values; empty where there are none."""
    ids: Any = next((samples[key] for key in ("image_path", "image_id", "instance_id") if key in samples), [])
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)


def select(samples: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return rows of a batch, of its tensors and lists of batch length; other values are kept as they are."""
    size = count_samples(samples)

    def _pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == size:
            return value[list(rows)]
        return [value[i] for i in rows] if isinstance(value, list) and len(value) == size else value

    return {name: _pick(value) for name, value in samples.items()}
