"""Features, matching and captions of a stage-1 model, under the names that LAVIS's BLIP-2 gives them.

B: batch, Q: queries, D: width of the Q-Former, E: width of the shared space, T: text tokens,
Nc / Dc: CLIP's tokens C, Nm / Dm: MAE's tokens M, R: pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.blip2_models.blip2 import compute_sim_matrix
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_xformer.errors import UserError, one_of
from lavis_xformer.models.base import XFormerBase
from lavis_xformer.models.frozen import compute_dtype
from lavis_xformer.models.fusion import CrossAttentionBlock, Init
from lavis_xformer.models.parts import ITG_SOURCES
from lavis_xformer.models.samples import check_order, check_sampling, check_whole, take, texts_of

MODES = ("multimodal", "image", "text")


class FeatureModel(XFormerBase):
    """Stage 1's heads on Z', and inference with them, in which MAE always sees the whole image."""

    def __init__(
        self, *, embed_dim: int = 256, itg_source: str = "qformer", fusion_init: Init = "identity", **parts: Any
    ) -> None:
        """Add the heads to the shared parts.

        Args:
            embed_dim: E.
            itg_source: what captions are generated from. ``qformer``: BLIP-2's path, the queries' cached keys and
                values, which bypass Z'. ``xformer``: the text's states also attend to Z' before words are predicted.
            fusion_init: initialisation of that attention, as of the fusion; with ``identity`` it starts as BLIP-2.
            parts: of :class:`XFormerBase`.

        Raises:
            UserError: an unknown ``itg_source``, or a ``max_txt_len`` that the Q-Former can't read.
        """
        super().__init__(**parts)
        self._check_length("model.max_txt_len", self.max_txt_len)
        one_of("model.itg_source", itg_source, ITG_SOURCES)
        sizes = self.Qformer.config
        width = sizes.hidden_size
        self.itg_reader = (  # without self-attention, so that no token sees later ones
            CrossAttentionBlock(
                width=width,
                context_width=width,
                heads=sizes.num_attention_heads,
                self_attention=False,
                init=fusion_init,
                std=sizes.initializer_range,
            )
            if itg_source == "xformer"
            else None
        )
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)

    def image_features(self, z: Tensor) -> Tensor:
        """Z' (B, Q, D) -> features (B, Q, E) in the space shared with texts, L2-normalised, float32."""
        return F.normalize(self.vision_proj(z).float(), dim=-1)

    def text_features(self, states: Tensor) -> Tensor:
        """States of text tokens (..., D) -> features (..., E) in the same space, L2-normalised, float32."""
        return F.normalize(self.text_proj(states).float(), dim=-1)

    def match(self, clip: Tensor, mae: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
        """Score whether R images and texts belong together, on the multimodal Z'.

        Args:
            clip: C (R, Nc, Dc).
            mae: M (R, Nm, Dm), None where the fusion needs none.
            ids: (R, T) tokens.
            mask: (R, T), 1 is a token, 0 is padding.

        Returns:
            (R, 2) logits, column 1 says "they match".
        """
        zq = self.query_image_and_text(clip, ids, mask)  # (R, Q, D)
        z, _ = self.fusion.refine(zq, mae)
        return self.itm_head(z).mean(dim=1)

    @contextlib.contextmanager
    def writing_from(self, z: Tensor) -> Iterator[None]:
        """Let the text decoder read Z' (B, Q, D) too in this context, if ``itg_source`` says so."""
        reader = self.itg_reader
        if reader is None:
            yield
            return
        hook = self.Qformer.cls.register_forward_pre_hook(lambda head, states: (reader(states[0], z),))
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> BlipOutputFeatures:
        """Features of images, of texts, or of both together.

        Args:
            samples: ``image`` (B, 3 or 6, S, S) and ``text_input`` (B strings), as the mode needs. Texts are
                truncated at the Q-Former's maximum length, not at ``max_txt_len``.
            mode: ``image``: ``image_embeds`` (B, Q, D), which is Z', and ``image_embeds_proj`` (B, Q, E), normalised;
                ``text``: ``text_embeds`` (B, T, D) and ``text_embeds_proj`` (B, T, E), normalised, the first token
                standing for the text; ``multimodal``: ``multimodal_embeds`` (B, Q, D).

        Raises:
            UserError: an unknown mode, or an input that the mode needs is missing.
        """
        one_of("mode", mode, MODES)
        if mode == "image":
            z = self.encode_queries(take(samples, "image"))
            return BlipOutputFeatures(image_embeds=z, image_embeds_proj=self.image_features(z))
        most = self.Qformer.config.max_position_embeddings  # LAVIS truncates nothing, and fails on longer texts
        texts = texts_of(samples, len(take(samples, "image")) if mode == "multimodal" else None)
        text = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=most).to(
            self.device
        )
        if mode == "text":
            hidden = self.encode_text(text.input_ids, text.attention_mask)  # (B, T, D)
            return BlipOutputFeatures(text_embeds=hidden, text_embeds_proj=self.text_features(hidden))
        tokens = self.encode_image(take(samples, "image"))
        zq = self.query_image_and_text(tokens.clip, text.input_ids, text.attention_mask)
        return BlipOutputFeatures(multimodal_embeds=self.fusion.refine(zq, tokens.mae_tokens)[0])

    def forward_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3 or 6, S, S) -> Z' (B, Q, D), and the image tokens that :meth:`compute_itm` takes.

        The image tokens are what the Q-Former reads (B, Nc, Dc), C or a fusion of C and M. A fusion that aligns M gets
        C and M in one tensor (B, Nc + Nm, max(Dc, Dm)), so that LAVIS's retrieval code can store and repeat them; on a
        GPU in ``vit_precision``, since it stores those of all images.
        """
        tokens = self.encode_image(image)
        joined = self._join(tokens.clip, tokens.mae_tokens)
        return self.refined(tokens), joined.to(compute_dtype(self.device, self.vit_precision))

    def forward_text(self, text_tokens: Any) -> Tensor:
        """Tokenised text (B, T) -> (B, D), the state of its first token."""
        return self.encode_text(text_tokens.input_ids, text_tokens.attention_mask)[:, 0]

    def compute_itm(self, image_inputs: Tensor, text_ids: Tensor, text_atts: Tensor) -> Tensor:
        """Score R pairs of image tokens (from :meth:`forward_image`) and text (R, T): (R,) logits of a match."""
        clip, mae = self._split(image_inputs.float())
        return self.match(clip, mae, text_ids, text_atts)[:, 1]

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any) -> tuple[Any, Any]:
        """Image-to-text and text-to-image scores for LAVIS's retrieval task: ITC, re-ranked by ITM.

        In float32, as by LAVIS's runner: in bfloat16, many of a thousand similarities are equal.

        Raises:
            UserError: ``k_test`` is less than 1, or larger than the number of images or texts.
        """
        check_whole(1, k_test=task_cfg.k_test)
        smaller = min(len(data_loader.dataset.text), len(data_loader.dataset.image))
        if task_cfg.k_test > smaller:
            raise UserError(f"run.k_test is {task_cfg.k_test}, but there are only {smaller} candidates")
        with torch.autocast(self.device.type, enabled=False):
            return compute_sim_matrix(model=self, data_loader=data_loader, k_test=task_cfg.k_test)

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Caption images with the Q-Former's own text decoder, as LAVIS's BLIP-2 does; B strings.

        Args:
            samples: ``image`` (B, 3 or 6, S, S).
            use_nucleus_sampling: sample instead of searching with beams.
            num_beams: 1 means greedy.
            max_length: longest caption in tokens.
            min_length: shortest caption in tokens.
            top_p: probability mass that nucleus sampling keeps.
            repetition_penalty: 1 means none.

        Raises:
            UserError: a number that makes no sense, or more tokens than the Q-Former has positions for.
        """
        check_whole(1, num_beams=num_beams)
        check_whole(2, max_length=max_length)  # the start token counts
        check_whole(0, min_length=min_length)
        check_sampling(top_p=top_p, repetition_penalty=repetition_penalty)
        self._check_length("max_length", max_length)
        check_order("min_length", min_length, "max_length", max_length)
        beams = 1 if use_nucleus_sampling else num_beams
        tokens = self.encode_image(take(samples, "image"))
        start = torch.full((len(tokens.clip), 1), self.tokenizer.bos_token_id, device=tokens.clip.device)
        z, clip = (part.repeat_interleave(beams, dim=0) for part in (self.refined(tokens), tokens.clip))
        with self.writing_from(z):
            ids = self.Qformer.generate(
                input_ids=start,
                query_embeds=self.queries(len(clip)),
                encoder_hidden_states=clip,
                max_length=max_length,
                min_length=min_length,
                num_beams=beams,
                do_sample=use_nucleus_sampling,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                eos_token_id=self.tokenizer.sep_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _check_length(self, name: str, tokens: int) -> None:
        """Reject more tokens than the Q-Former has position embeddings for."""
        if tokens > (most := self.Qformer.config.max_position_embeddings):
            raise UserError(f"{name} is {tokens}; the Q-Former reads at most {most} tokens")

    def _join(self, clip: Tensor, mae: Tensor | None) -> Tensor:
        """C (B, Nc, Dc) and M (B, Nm, Dm) -> (B, Nc + Nm, max(Dc, Dm)), zero padded."""
        if mae is None:
            return clip
        width = max(clip.shape[-1], mae.shape[-1])
        return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in (clip, mae)], dim=1)

    def _split(self, joined: Tensor) -> tuple[Tensor, Tensor | None]:
        """Undo :meth:`_join`."""
        if not self.fusion.aligns_mae:
            return joined, None
        clip, mae = self.split_tokens(joined, dim=1)
        if self.mae is None:  # M is CLIP's too, so both have one width
            return clip, mae
        return clip[..., : self.ln_vision.normalized_shape[0]], mae[..., : self.mae.width]
