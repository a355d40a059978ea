"""Attention maps of the Q-Former's and the fusion's cross-attentions, and which of their regions support a text.

B: images, Q: queries, D: width of the Q-Former, N: patches, S: side of the image, L: queries of an attention, K: its
keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from lavis_xformer.errors import UserError
from lavis_xformer.models.base import XFormerBase
from lavis_xformer.models.features import FeatureModel
from lavis_xformer.models.fusion import Attention, Concat
from lavis_xformer.models.samples import take, texts_of


def attention_maps(model: XFormerBase, samples: dict[str, Any], *, layer: int = -1) -> dict[str, Tensor]:
    """Where in an image the queries look; with a text, which of these regions support it.

    Without a text, these are the attention weights. With one, they are multiplied by the positive part of the gradient
    of the text's score (Grad-CAM on cross-attention, as in ALBEF, arXiv 2107.07651): in stage 1 the log-odds of a
    match, in stage 2 the log-likelihood of a caption or answer, averaged over all tokens of the batch, so that values
    are comparable within a map only.

    Args:
        model: of stage 1 or 2, in eval mode.
        samples: ``image`` (B, 3 or 6, S, S); ``text_input``, B captions, or in stage 2 with ``answer`` B questions.
        layer: index among the Q-Former's cross-attention layers; -1 is the last.

    Returns:
        Means over heads (B, Q, side, side) with N = side ** 2, CLS left out: ``C``, the Q-Former's attention to
        CLIP; ``M'``, that of the fusion's last layer to the aligned M, or ``M``, the Q-Former's where it reads that
        too (``concat``); none of tokens that are no CLS and square of patches.

    Raises:
        UserError: there is no such layer.
    """
    image, explained = take(samples, "image"), "text_input" in samples
    with recording(model) as found, _gradients(explained), _trainable(model.query_tokens):
        score = _score(model, samples) if explained else model.encode_queries(image)
    looking = [name for name in found if name.startswith("Qformer.")]
    if not -len(looking) <= layer < len(looking):
        raise UserError(f"layer {layer}: the Q-Former has {len(looking)} cross-attention layers")
    wanted = {"C": found[looking[layer]]}
    if enriching := [name for name in found if name.startswith("fusion.enrich_blocks.")]:
        wanted["M'"] = found[enriching[-1]]
    if explained:
        gradients = torch.autograd.grad(score, list(wanted.values()))
        pairs = zip(wanted.items(), gradients, strict=True)
        wanted = {name: (weights * gradient).clamp_min(0) for (name, weights), gradient in pairs}
    means = {name: weights.detach().mean(dim=1) for name, weights in wanted.items()}  # (B, Q, K)
    if isinstance(model.fusion, Concat):
        means["C"], means["M"] = model.split_tokens(means["C"], dim=-1)
    return {name: _square(weights) for name, weights in means.items() if _is_square(weights)}


@contextlib.contextmanager
def recording(model: XFormerBase) -> Iterator[dict[str, Tensor]]:
    """Keep the maps (B, heads, L, K) of each cross-attention's first pass in this context, with their graph."""
    found: dict[str, Tensor] = {}

    def _ours(name: str, module: Attention, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        attended, weights = module.with_map(*inputs)
        found.setdefault(name, weights)
        return attended  # in place of the output, so that it depends on the map

    def _the_qformers(name: str, module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        found.setdefault(name, output[1])

    hooks = []
    for name, module in model.named_modules():
        if name.startswith("fusion.") and name.endswith(".cross_attention") and isinstance(module, Attention):
            hooks.append(module.register_forward_hook(partial(_ours, name)))
        elif name.startswith("Qformer.") and name.endswith(".crossattention.self"):
            hooks.append(module.register_forward_hook(partial(_the_qformers, name)))
    config = model.Qformer.bert.config
    before, config.output_attentions = config.output_attentions, True
    try:
        yield found
    finally:
        config.output_attentions = before
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _gradients(wanted: bool) -> Iterator[None]:
    """Compute gradients or not, also within ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        yield


@contextlib.contextmanager
def _trainable(queries: nn.Parameter) -> Iterator[None]:
    """Let maps have gradients in this context, even if ``train_only`` has frozen all that they depend on."""
    before = queries.requires_grad
    queries.requires_grad_(True)
    try:
        yield
    finally:
        queries.requires_grad_(before)


def _score(model: Any, samples: dict[str, Any]) -> Tensor:
    """The model's score of the texts, over all images, which don't affect each other."""
    if not isinstance(model, FeatureModel):
        return -model(samples)["loss_lm"]
    text = model.tokenize(texts_of(samples, len(samples["image"])))
    tokens = model.encode_image(samples["image"])
    return model.match(tokens.clip, tokens.mae_tokens, text.input_ids, text.attention_mask).diff(dim=1).sum()


def _is_square(weights: Tensor) -> bool:
    """Whether the keys can be CLS and a square of patches, as those of a fusion's other tokens perhaps can't."""
    return isqrt(weights.shape[-1] - 1) ** 2 == weights.shape[-1] - 1


def _square(weights: Tensor) -> Tensor:
    """(B, Q, 1 + N), CLS first, -> (B, Q, side, side)."""
    side = isqrt(weights.shape[-1] - 1)
    return weights[..., 1:].unflatten(-1, (side, side))
