"""Nested configurations as flat ones: dotted paths and what is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import Container, OmegaConf


def nodes(config: Container | Mapping[Any, Any], prefix: str = "", leaves: bool = False) -> dict[str, Any]:
    """Return every node, or every leaf, by its dotted path; interpolations stay text."""
    values = OmegaConf.to_container(config) if isinstance(config, Container) else config
    found: dict[str, Any] = {}
    for key, value in cast(Mapping[Any, Any], values).items():
        inside = isinstance(value, Mapping)
        if not (inside and value and leaves):
            found[f"{prefix}{key}"] = value
        if inside:
            found |= nodes(value, f"{prefix}{key}.", leaves)
    return found
