"""LAVIS's decoders with their key/value cache, which they lose under transformers >= 4.26."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Cached:
    """Mixin before a LAVIS decoder: takes the cache in generation under its old and its new name."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, past_key_values: Any = None, past: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the cache on under its old name, ``past``, which alone LAVIS's classes read."""
        cache = past if past_key_values is None else past_key_values
        return super().prepare_inputs_for_generation(input_ids, past=cache, **kwargs)  # type: ignore[misc]
