"""The losses of both stages, as pure functions of tensors.

ITC, ITM, ITG and language modelling are BLIP-2's (arXiv 2301.12597, section 3; LAVIS `blip2_qformer.py`,
`blip2_opt.py`), reconstruction is MAE's (arXiv 2111.06377). None of them depends on a model, a process group or a
configuration.

B: samples of this process, G: samples of all processes, I: images, Q: queries, E: width of the shared space, T: texts
or text tokens, V: vocabulary, N: image patches, P: values per patch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1  # BLIP-2's, for ITC and ITG
NEGATIVE_FLOOR = 1e-4  # BLIP-2's: gives every negative a nonzero probability
NO_TARGET = -100  # label of tokens that are excluded from the language-modelling loss


def similarity(image_feats: Tensor, text_feats: Tensor) -> Tensor:
    """Cosine similarity of each text and each image's best-matching query.

    Args:
        image_feats: (I, Q, E), L2-normalised, one feature per query.
        text_feats: (T, E), L2-normalised.

    Returns:
        (I, T) float32, the maximum over the queries. Autocast is disabled because bfloat16's spacing near 1, divided
        by the temperature, would be 0.06.
    """
    with torch.autocast(image_feats.device.type, enabled=False):
        return torch.einsum("iqe,te->itq", image_feats.float(), text_feats.float()).amax(-1)


def itc(sim_i2t: Tensor, sim_t2i: Tensor, targets: Tensor) -> Tensor:
    """Image-text contrastive loss: match each image with its text among all texts, and each text with its image.

    Args:
        sim_i2t: (B, G) similarities divided by the temperature, images to all texts.
        sim_t2i: (B, G) similarities divided by the temperature, texts to all images.
        targets: (B,) column of each sample's own partner.

    Returns:
        The mean of both directions' label-smoothed cross-entropies, a scalar.
    """
    i2t = F.cross_entropy(sim_i2t, targets, label_smoothing=LABEL_SMOOTHING)
    t2i = F.cross_entropy(sim_t2i, targets, label_smoothing=LABEL_SMOOTHING)
    return (i2t + t2i) / 2


@torch.no_grad()
def hard_negatives(sim: Tensor, targets: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one wrong partner per sample, similar ones more often, in one batched step.

    Args:
        sim: (B, G) similarities divided by the temperature; a row that is not finite is sampled uniformly, so that the
            losses can still be computed and show which of them is not finite.
        targets: (B,) column of each sample's own partner, which is never drawn.
        generator: random generator; torch's default one if None.

    Returns:
        (B,) columns.

    Raises:
        ValueError: G is 1, so there is no wrong partner.
    """
    if sim.shape[1] < 2:
        raise ValueError("a global batch of one sample has no negatives; skip ITM's negatives")
    weights = sim.softmax(dim=1).nan_to_num(0.0) + NEGATIVE_FLOOR  # (B, G)
    weights = weights.scatter(1, targets.unsqueeze(1), 0.0)
    return torch.multinomial(weights, 1, generator=generator).flatten()


def itm(logits: Tensor, labels: Tensor) -> Tensor:
    """Image-text matching loss.

    Args:
        logits: (R, 2) for R pairs; column 1 says "they match".
        labels: (R,) 1 for a matching pair, 0 for a mismatched one.

    Returns:
        The mean cross-entropy, a scalar.
    """
    return F.cross_entropy(logits, labels)


def itg(logits: Tensor, token_ids: Tensor, pad_id: int) -> Tensor:
    """Image-grounded text generation loss: predict each token from those before it.

    Args:
        logits: (B, T, V) for the next token.
        token_ids: (B, T) input, beginning with the decoder's start token.
        pad_id: id of the padding token, which isn't predicted.

    Returns:
        The label-smoothed cross-entropy, averaged over all non-padding tokens, a scalar.
    """
    labels = token_ids[:, 1:].flatten()  # (B * (T - 1),)
    scores = logits[:, :-1].flatten(0, 1)  # (B * (T - 1), V)
    return F.cross_entropy(scores, labels, ignore_index=pad_id, label_smoothing=LABEL_SMOOTHING)


def reconstruction(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error on the masked patches only (MAE, section 3, "Reconstruction target").

    Args:
        prediction: (B, N, P).
        target: (B, N, P) pixels, normalised per patch if the checkpoint was trained that way.
        mask: (B, N), 0 is keep, 1 is remove.

    Returns:
        A scalar.
    """
    error = (prediction - target).square().mean(-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every token: logits (B, T, V), labels (B, T) -> (B, T), 0 at :data:`NO_TARGET`."""
    return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=NO_TARGET, reduction="none")


def language_modelling(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy of the target tokens.

    Args:
        logits: (B, T, V).
        labels: (B, T), :data:`NO_TARGET` where a token is excluded.
        counts: (B, T), how many times each token counts; 0 where it is excluded.
    """
    return (token_losses(logits, labels) * counts).sum() / counts.sum()


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return ``loss``, the weighted sum of scalar terms, and each term as ``loss_<name>``."""
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}}
