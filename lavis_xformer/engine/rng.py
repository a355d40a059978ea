"""Random state of a process as plain values, and seeds that depend only on their keys."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_of(*keys: int) -> int:
    """Return a 31-bit seed for a tuple of keys: equal keys give equal seeds, in any process."""
    digest = hashlib.blake2b(",".join(map(str, keys)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, CUDA's included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed the generators that data loading draws from; leaves CUDA's alone, and is cheap."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def capture() -> dict[str, Any]:
    """Return the state of all generators as values that ``torch.load(weights_only=True)`` reads."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Restore what ``capture`` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with generators seeded by ``seed``, then restore their previous state."""
    before = capture()
    seed_everything(seed)
    try:
        yield
    finally:
        restore(before)
