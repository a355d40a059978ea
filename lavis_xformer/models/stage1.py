"""X-Former's stage 1: ITC + ITM + ITG + reconstruction (arXiv 2407.13851, section 3).

B: samples of this process, G: samples of all processes, Q: queries, D: width of the Q-Former, E: width of the shared
space, Nc / Dc: CLIP's tokens C, Nm / Dm: MAE's tokens M, N: image patches, T: text tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from omegaconf import DictConfig
from torch import Tensor, nn

from lavis_xformer import losses
from lavis_xformer.distributed import gather, own_rows, token_mean
from lavis_xformer.models.base import Tokens
from lavis_xformer.models.checkpoints import load_pretrained
from lavis_xformer.models.features import FeatureModel
from lavis_xformer.models.parts import build_parts, check_mask_ratio, given, options_of, weights_of
from lavis_xformer.models.samples import take, texts_of


@registry.register_model("xformer")
class XFormer(FeatureModel):
    """The first-stage model: queries that carry both semantics (CLIP) and visual detail (MAE).

    Usage:
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("xformer", "mini")
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "mini": "models/xformer_mini.yaml",
        "pretrain": "models/xformer_pretrain.yaml",
    }
    #: by default
    LOSS_WEIGHTS: ClassVar[dict[str, float]] = {"itc": 1.0, "itm": 1.0, "itg": 1.0, "rec": 1.0}

    def __init__(
        self,
        *,
        mask_ratio: float = 0.5,
        mask_vl: bool = True,
        loss_weights: dict[str, float] | None = None,
        **parts: Any,
    ) -> None:
        """Add what the losses of stage 1 need.

        Args:
            mask_ratio: share of the patches hidden from MAE in training, whatever the weight of ``rec``: leaving the
                reconstruction out changes only the loss. A fusion that does not align M (``concat``, ``early``) has
                nothing to reconstruct from, and sees the whole M in training as in inference.
            mask_vl: whether ITC, ITM and ITG see the masked M too, in one pass; otherwise they see the whole M, and
                MAE runs a second time for the reconstruction.
            loss_weights: of ``itc``, ``itm``, ``itg`` and ``rec``; 1 by default, 0 leaves a loss out.
            parts: of :class:`FeatureModel`.

        Raises:
            UserError: a wrong weight, weights with which nothing would be trained, or a mask ratio outside [0, 1).
        """
        super().__init__(**parts)
        check_mask_ratio("model.mask_ratio", mask_ratio)
        self.temp = nn.Parameter(0.07 * torch.ones([]))
        self.mask_vl = mask_vl
        self.weigh_losses(weights_of(loss_weights, self.LOSS_WEIGHTS), mask_ratio)

    def forward(
        self,
        samples: dict[str, Any],
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            samples: ``image`` (B, 3 or 6, S, S) and ``text_input``, B strings.
            noise: (B, N), decides which patches MAE doesn't see; drawn if None.
            generator: draws the hard negatives; torch's default one if None.

        Returns:
            Scalars: ``loss``, the weighted sum; ``loss_itc``, ``loss_itm``, ``loss_itg``, ``loss_rec`` (where M' is
            reconstructed); ``itm_accuracy``; in eval mode ``rec_mae``, the frozen MAE's own error beside ``loss_rec``.
        """
        image = take(samples, "image")
        text = self.tokenize(texts_of(samples, len(image)))
        masked, read = self._encode_for_training(image, noise)

        zq = self.query_image(read.clip, use_cache=True)  # Zq (B, Q, D)
        z, aligned = self.fusion.refine(zq.last_hidden_state, read.mae_tokens)  # Z' and M'
        if masked is not read:
            aligned = self.fusion.align(masked.mae_tokens, zq.last_hidden_state)

        loss_itc, sim_i2t, sim_t2i = self._itc(z, text)
        loss_itm, itm_accuracy = self._itm(read, text, sim_i2t, sim_t2i, generator)
        loss_itg = self._itg(zq.past_key_values, z, text)
        terms = {"itc": loss_itc, "itm": loss_itm, "itg": loss_itg}
        if self.reconstructs:
            terms["rec"] = self.reconstruction_loss(aligned, masked)

        found = {**losses.weighted(terms, self.loss_weights), "itm_accuracy": itm_accuracy}
        if self.reconstructs and not self.training:
            found["rec_mae"] = self.reconstruction_loss(masked.mae_tokens, masked).detach()  # of M: the reference
        return found

    def _encode_for_training(self, image: Tensor, noise: Tensor | None) -> tuple[Tokens, Tokens]:
        """C and M to reconstruct from, and C and M that the other losses read: the same where ``mask_vl`` is set."""
        if self.mask_vl and self.fusion.aligns_mae:
            masked = self.encode_image(image, mask_ratio=self.mask_ratio, noise=noise)
            return masked, masked
        whole = self.encode_image(image)
        if not self.reconstructs:
            return whole, whole
        return self.mask_again(whole, mask_ratio=self.mask_ratio, noise=noise), whole

    def _itc(self, z: Tensor, text: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Z' (B, Q, D) against text, over all processes; also returns both similarities (B, G)."""
        image_feats = self.image_features(z)  # (B, Q, E)
        text_feats = self.text_features(self.forward_text(text))  # (B, E)
        sim_i2t = losses.similarity(image_feats, gather(text_feats)) / self.temp  # (B, G)
        sim_t2i = losses.similarity(gather(image_feats), text_feats).t() / self.temp  # (B, G)
        targets = own_rows(len(z), z.device)
        return losses.itc(sim_i2t, sim_t2i, targets), sim_i2t, sim_t2i

    def _itm(
        self,
        tokens: Tokens,
        text: Any,
        sim_i2t: Tensor,
        sim_t2i: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Do image and text belong together? B true pairs, B with a hard wrong image, B with a hard wrong text."""
        clip, mae, ids, mask = tokens.clip, tokens.mae_tokens, text.input_ids, text.attention_mask
        if sim_i2t.shape[1] > 1:  # a global batch of one sample has no negatives
            own = own_rows(len(ids), ids.device)
            image_neg = losses.hard_negatives(sim_t2i, own, generator)  # (B,) a wrong image for each text
            text_neg = losses.hard_negatives(sim_i2t, own, generator)  # (B,) a wrong text for each image
            clip = torch.cat([clip, gather(clip)[image_neg], clip])  # (3B, Nc, Dc)
            mae = None if mae is None else torch.cat([mae, gather(mae)[image_neg], mae])
            ids = torch.cat([ids, ids, gather(ids)[text_neg]])  # (3B, T)
            mask = torch.cat([mask, mask, gather(mask)[text_neg]])
        logits = self.match(clip, mae, ids, mask)  # (3B, 2)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(tokens.clip)] = 1
        return losses.itm(logits, labels), (logits.argmax(-1) == labels).float().mean()

    def _itg(self, query_cache: Any, z: Tensor, text: Any) -> Tensor:
        """Caption the image: text sees the queries' cached keys and values, as in BLIP-2, and Z' by ``itg_source``."""
        ids = text.input_ids.clone()  # (B, T)
        ids[:, 0] = self.tokenizer.bos_token_id
        queries = ids.new_ones(len(ids), self.query_tokens.shape[1])  # (B, Q)
        with self.writing_from(z):
            logits = self.Qformer(
                ids,
                attention_mask=torch.cat([queries, text.attention_mask], dim=1),
                past_key_values=query_cache,
                return_dict=True,
            ).logits  # (B, T, V)
        loss = losses.itg(logits, ids, self.tokenizer.pad_token_id)
        return token_mean(loss, text.attention_mask[:, 1:].sum())

    @classmethod
    def from_config(cls, cfg: DictConfig) -> XFormer:
        """Build the model from a ``model`` configuration and load the checkpoints it names.

        Raises:
            UserError: a name, folder or file in the configuration is wrong.
        """
        model = cls(**given(cfg, *options_of(cls)), **build_parts(cfg))
        model.load_report = load_pretrained(model, cfg)
        return model
