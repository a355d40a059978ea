"""Does a token encode its position? A linear readout of its row and column from the token alone.

Attention can look something up at a position, or report a position, only as far as the tokens encode it. The probe
of this package tells every token's row and column; the Q-Former and X-Former's fusion don't (except for
``token_positions``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FITTED = 0.75  # share of the images that the regression is fitted on
RIDGE = 1e-2  # its penalty, on layer-normed tokens


def position_r2(tokens: Tensor) -> float:
    """R² of the rows and columns of patches, predicted from held-out images' tokens by ridge regression.

    Args:
        tokens: (N, 1 + P, D) of N images, CLS first, patches of a square grid in reading order.

    Returns:
        1 if a token determines its position exactly, 0 or less if it says nothing about it linearly.
    """
    x = F.layer_norm(tokens[:, 1:].float(), tokens.shape[-1:])  # (N, P, D)
    x = F.pad(x, (0, 1), value=1.0).double()  # and a constant
    side = round(x.shape[1] ** 0.5)
    axis = torch.linspace(-1, 1, side, dtype=x.dtype)
    places = torch.cartesian_prod(axis, axis).expand(len(x), -1, -1)  # (N, P, 2)
    fitted = int(FITTED * len(x))
    seen, shown = x[:fitted].flatten(0, 1), x[fitted:]
    penalty = RIDGE * torch.eye(x.shape[-1], dtype=x.dtype)
    weights = torch.linalg.solve(seen.T @ seen + penalty, seen.T @ places[:fitted].flatten(0, 1))  # (D + 1, 2)
    error = (shown @ weights - places[fitted:]).square().mean()
    return float(1 - error / places.square().mean())
