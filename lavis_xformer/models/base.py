"""Shared by both stages: CLIP, MAE, the Q-Former and the fusion, from an image to Zq and Z'.

Weights have the names of LAVIS's BLIP-2 (``visual_encoder``, ``ln_vision``, ``Qformer``, ``query_tokens``), so that its
checkpoints can be loaded.

B: batch, Q: queries, D: width of the Q-Former, Nc / Dc: CLIP's tokens C or, after `concat`, those of C and M that the
Q-Former reads, Nm / Dm: MAE's tokens M, N: image patches, T: text tokens, S: side of the image.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2 import Blip2Base, LayerNorm
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as BertOutput
from typing_extensions import Self

from lavis_xformer import losses
from lavis_xformer.distributed import world_size
from lavis_xformer.errors import UserError
from lavis_xformer.images import OtherImages, unpack
from lavis_xformer.models import parts, towers
from lavis_xformer.models.checkpoints import CheckpointLoading
from lavis_xformer.models.frozen import Precision, compact, computing, freeze, is_frozen
from lavis_xformer.models.fusion import Fusion
from lavis_xformer.models.mae import MaeFeatures, MaskedAutoencoder, sincos, unmasked
from lavis_xformer.paths import type_path

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """The two encoders' outputs for a batch of images.

    Built anew rather than by ``_replace``, with which torch.compile (2.11) fails.
    """

    clip: Tensor  #: C (B, Nc, Dc), or the fusion of C and M that the Q-Former reads
    mae: MaeFeatures | None  #: M and its mask; None unless the fusion aligns M
    pixels: Tensor | None  #: (B, 3, S, S) as MAE saw them, the reconstruction target

    @property
    def mae_tokens(self) -> Tensor | None:
        """M (B, Nm, Dm)."""
        return None if self.mae is None else self.mae.tokens


class XFormerBase(CheckpointLoading, Blip2Base):
    """The two encoders, the Q-Former between vision and language, and the fusion."""

    #: loaded if a user names no type: ships with the package and runs offline; None if there is no such type
    DEFAULT_MODEL_TYPE: ClassVar[str | None] = "mini"
    #: keys that ``from_config`` reads, besides LAVIS's arch, model_type, load_finetuned, finetuned and pretrained; the
    #: names of the constructor's arguments are added
    CONFIG_KEYS: ClassVar[frozenset[str]] = parts.KEYS | {"train_only", "blip2_pretrained"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Add the keys that the model's constructor takes to those of its configuration."""
        super().__init_subclass__(**kwargs)
        cls.CONFIG_KEYS |= parts.options_of(cls)

    def __init__(
        self,
        *,
        visual_encoder: Any,
        mae: MaskedAutoencoder | None,
        qformer: Any,
        tokenizer: Any,
        fusion: Fusion,
        image_size: int,
        freeze_vit: bool = True,
        vit_precision: Precision = "fp16",
        max_txt_len: int = 32,
        token_positions: Collection[str] = (),
        clip_layer: int | None = None,
        shuffle_mae: bool = False,
    ) -> None:
        """Assemble the built parts.

        Args:
            visual_encoder: CLIP's image encoder, (B, 3, S, S) -> C (B, Nc, Dc), with ``num_features`` = Dc.
            mae: the masked autoencoder; if None, a fusion that needs M gets CLIP's tokens instead.
            qformer: LAVIS's, with the configuration of :func:`towers.qformer_config`.
            tokenizer: BERT's, with the decoder's start token as ``bos_token``.
            fusion: one of :data:`fusion.FUSIONS`.
            image_size: side of CLIP's input in pixels.
            freeze_vit: whether CLIP is frozen; MAE always is.
            vit_precision: of the two encoders on a GPU; on a CPU they run in fp32.
            max_txt_len: longest text in tokens.
            token_positions: ``clip``, ``mae``: whose tokens get position embeddings; M' is decoded without them.
            clip_layer: without ``mae``, M is the layer-normed output of this CLIP block; None: C itself.
            shuffle_mae: give each image another's M, from its batch or the latest before, to measure what M adds.

        Raises:
            UserError: ``freeze_vit`` is False, but the encoder is a MAE, which is always frozen.
        """
        super().__init__()
        if not freeze_vit and is_frozen(visual_encoder):
            raise UserError("model.freeze_vit is False, but a MAE as model.vit_model stays frozen; set it to True")
        self.visual_encoder: Any = freeze(visual_encoder) if freeze_vit else visual_encoder
        self.ln_vision = LayerNorm(visual_encoder.num_features)
        self.mae = mae if fusion.needs_mae else None
        self._add_qformer(qformer, tokenizer)
        self.fusion = fusion
        self.image_size = image_size
        self.vit_precision: Precision = vit_precision
        self.max_txt_len = max_txt_len
        self.token_positions = frozenset(token_positions)
        self.clip_layer = clip_layer
        self.shuffle_mae = shuffle_mae
        self._others = OtherImages()

    def train(self, mode: bool = True) -> Self:
        """Set the mode, except of frozen parts, which stay in eval mode."""
        super().train(mode)
        for part in self.children():
            if is_frozen(part):
                part.eval()
        return self

    def drop_text_branch(self) -> None:
        """Remove the parts of the Q-Former that only text needs, as BLIP-2 does for its second stage."""
        self.Qformer.cls = None
        bert = self.Qformer.bert
        bert.embeddings.word_embeddings = bert.embeddings.position_embeddings = None
        for layer in bert.encoder.layer:
            layer.intermediate = layer.output = None

    def _add_qformer(self, qformer: Any, tokenizer: Any) -> None:
        """Add the queries, and initialise their feed-forward layers from the text's, as BLIP-2 does."""
        self.tokenizer = tokenizer
        self.Qformer: Any = qformer
        self.Qformer.resize_token_embeddings(len(tokenizer))
        state = self.Qformer.state_dict()
        for name, parameter in self.Qformer.named_parameters():
            if "_query" in name:
                parameter.data.copy_(state[name.replace("_query", "")])
        size = qformer.config
        self.query_tokens = nn.Parameter(torch.randn(1, size.query_length, size.hidden_size) * size.initializer_range)

    # ---------------------------------------------------------------- images

    def encode_image(self, image: Tensor, *, mask_ratio: float = 0.0, noise: Tensor | None = None) -> Tokens:
        """Run both encoders: image -> C and, where the fusion aligns it, M.

        Args:
            image: (B, 3, S, S) normalised for CLIP, or (B, 6, S, S) from our image processors.
            mask_ratio: share of the patches hidden from MAE.
            noise: (B, N), decides which; drawn if None.

        Raises:
            UserError: the image is not a float tensor, or not of the size or number of channels that the model needs;
                ``shuffle_mae`` needs another image, and there is none.
        """
        tokens = self._encode(image, mask_ratio, noise)
        if self.shuffle_mae and tokens.mae is not None:  # a control at test time: both encoders run again
            others = self._encode(self._others.of(image), mask_ratio, noise)
            tokens = Tokens(tokens.clip, others.mae, others.pixels)
        clip = compact(self.fusion.visual_tokens(tokens.clip, tokens.mae_tokens))
        return Tokens(clip, tokens.mae, tokens.pixels) if self.fusion.aligns_mae else Tokens(clip, None, None)

    def mask_again(self, tokens: Tokens, *, mask_ratio: float, noise: Tensor | None = None) -> Tokens:
        """The same C with the M of a masked image, running only MAE; arguments as in :meth:`encode_image`."""
        assert tokens.pixels is not None
        m = self._run_mae(tokens.pixels, mask_ratio, noise)
        return Tokens(tokens.clip, self._placed(m), tokens.pixels)

    def split_tokens(self, joined: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
        """Split C's and M's tokens, which are concatenated along ``dim`` (Nc + Nm)."""
        count = joined.shape[dim] // 2 if self.mae is None else 1 + self.mae.num_patches  # Nm, or Nc if M is CLIP's
        clip, mae = joined.tensor_split([-count], dim=dim)
        return clip, mae

    def _views(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's and MAE's views of images, each (B, 3, S, S)."""
        if not isinstance(image, Tensor) or not image.is_floating_point():
            found = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"samples['image'] is a {found}, not a float tensor such as vis_processors['eval'](image).unsqueeze(0)"
            )
        mae_size = self.image_size if self.mae is None else self.mae.image_size
        return unpack(image.float(), clip_size=self.image_size, mae_size=mae_size)

    def _encode(self, image: Tensor, mask_ratio: float, noise: Tensor | None) -> Tokens:
        """C and M of an image, with their positions, before the fusion."""
        clip_pixels, pixels = self._views(image)
        with towers.tap(self.visual_encoder, self.clip_layer) as middle:
            clip = self.ln_vision(self._run_clip(clip_pixels))  # (B, Nc, Dc)
        placed = clip + sincos(clip.shape[-1], clip.shape[1] - 1).to(clip) if "clip" in self.token_positions else clip
        if not self.fusion.needs_mae:
            return Tokens(placed, mae=None, pixels=None)
        if self.mae is None:
            m = unmasked(F.layer_norm(middle[0].float(), middle[0].shape[-1:]) if middle else clip)
            return Tokens(placed, self._placed(m), pixels=None)
        return Tokens(placed, self._placed(self._run_mae(pixels, mask_ratio, noise)), pixels)

    def _placed(self, mae: MaeFeatures) -> MaeFeatures:
        """M with its positions, if ``token_positions`` has ``mae``."""
        tokens = mae.tokens + mae.positions() if "mae" in self.token_positions else mae.tokens
        return MaeFeatures(compact(tokens), mae.mask, mae.ids_restore)

    def _run_clip(self, pixels: Tensor) -> Tensor:
        if not is_frozen(self.visual_encoder):
            if any(weight.dtype != torch.float32 for weight in self.visual_encoder.parameters()):
                self.visual_encoder.float()  # cast while it was still frozen
            return self.visual_encoder(pixels)
        with computing(self.visual_encoder, self.device, self.vit_precision):
            return self.visual_encoder(pixels).float()

    def _run_mae(self, pixels: Tensor, mask_ratio: float, noise: Tensor | None) -> MaeFeatures:
        assert self.mae is not None
        with computing(self.mae.model.vit, self.device, self.vit_precision):
            mae = self.mae.encode(pixels, mask_ratio=mask_ratio, noise=noise)
        return MaeFeatures(mae.tokens.float(), mae.mask, mae.ids_restore)

    def weigh_losses(self, weights: dict[str, float], mask_ratio: float) -> None:
        """Set the weight of each loss, and the share of the patches hidden from MAE for the reconstruction, ``rec``.

        Raises:
            UserError: nothing would be trained, or MAE would see nothing.
        """
        self.loss_weights = weights
        self.mask_ratio = mask_ratio
        patches = 0 if self.mae is None else self.mae.num_patches
        seen = int(patches * (1 - mask_ratio))
        if patches and not seen:
            raise UserError(f"model.mask_ratio is {mask_ratio}; of {patches} patches MAE would see none")
        self.reconstructs = self.fusion.aligns_mae and weights["rec"] > 0 and seen < patches
        others = [weight for name, weight in weights.items() if name != "rec"]
        if not (self.reconstructs or any(others)):
            without = ", and this model reconstructs nothing (no MAE, fusion or mask for it)" if weights["rec"] else ""
            raise UserError(f"model.loss_weights: {weights}{without}: nothing would be trained; raise a weight")

    def reconstruction_loss(self, aligned: Tensor | None, tokens: Tokens) -> Tensor:
        """Reconstruct the masked patches from M' (B, Nm, Dm) with MAE's frozen decoder.

        The decoder's weights stay in fp32, and it computes in the run's precision, since gradients pass through it.
        """
        assert self.mae is not None
        assert tokens.mae is not None
        assert tokens.pixels is not None
        assert aligned is not None
        if "mae" in self.token_positions:
            aligned = aligned - tokens.mae.positions()
        prediction = self.mae.decode(aligned, tokens.mae.ids_restore)  # (B, N, P)
        return losses.reconstruction(prediction, self.mae.target(tokens.pixels), tokens.mae.mask)

    # ---------------------------------------------------------------- Q-Former

    def queries(self, batch_size: int) -> Tensor:
        """Z (B, Q, D), the learned queries."""
        return self.query_tokens.expand(batch_size, -1, -1)

    def query_image(self, clip: Tensor, *, use_cache: bool = False) -> BertOutput:
        """Let the queries read an image alone: C (B, Nc, Dc) -> Zq (B, Q, D) as ``last_hidden_state``."""
        return self.Qformer.bert(
            query_embeds=self.queries(len(clip)),
            encoder_hidden_states=clip,
            use_cache=use_cache,
            return_dict=True,
        )

    def encode_queries(self, image: Tensor) -> Tensor:
        """Image (B, 3 or 6, S, S) -> Z' (B, Q, D)."""
        return self.refined(self.encode_image(image))

    def refined(self, tokens: Tokens) -> Tensor:
        """C and M of an image -> Z' (B, Q, D)."""
        zq = self.query_image(tokens.clip).last_hidden_state  # (B, Q, D)
        return self.fusion.refine(zq, tokens.mae_tokens)[0]

    def query_image_and_text(self, clip: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Let queries and text see each other: C (B, Nc, Dc) and (B, T) ids -> Zq (B, Q, D)."""
        queries = self.queries(len(clip))
        output = self.Qformer.bert(
            text_ids,
            query_embeds=queries,
            attention_mask=torch.cat([text_mask.new_ones(queries.shape[:2]), text_mask], dim=1),
            encoder_hidden_states=clip,
            return_dict=True,
        )
        return output.last_hidden_state[:, : queries.shape[1]]

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Text alone: (B, T) ids -> (B, T, D)."""
        return self.Qformer.bert(text_ids, attention_mask=text_mask, return_dict=True).last_hidden_state

    def tokenize(self, text: list[str]) -> Any:
        """Text -> ``input_ids`` and ``attention_mask`` (B, T), T <= ``max_txt_len``, the same T on every process."""
        return self.tokenizer(
            text,
            padding="longest" if world_size() == 1 else "max_length",
            truncation=True,
            max_length=self.max_txt_len,
            return_tensors="pt",
        ).to(self.device)

    # ---------------------------------------------------------------- configuration

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """The YAML of a model type, or of a folder that ``lavis-xformer export`` has written.

        Raises:
            UserError: there is no such type.
        """
        exported = Path(model_type).expanduser() / "config.yaml"
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT and exported.is_file():
            return str(exported)
        return type_path(cls, model_type)

    @classmethod
    def default_config(cls, model_type: str) -> Any:
        """The configuration of a model type, or of an exported folder, whose weights ``model.pretrained`` then names.

        Raises:
            UserError: there is no such type, or the folder is of another model.
        """
        cfg = OmegaConf.load(cls.default_config_path(model_type))
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            theirs = registry.get_model_class(cfg.model.arch)
            if theirs is None or not (issubclass(theirs, cls) or issubclass(cls, theirs)):
                raise UserError(f"model_type: {model_type} is an exported {cfg.model.arch}, not {cls.__name__}")
            cfg.model.pretrained = model_type  # the folder's current path
        return cfg

    @classmethod
    def from_pretrained(cls, model_type: str) -> Self:
        """Build a model of one of its types, or of an exported folder, with the weights that its YAML names.

        Raises:
            UserError: there is no such type, or a name, folder or file in its YAML is wrong.
        """
        model_type = str(model_type)  # which may be the path of a folder
        if model_type.startswith("mini"):
            logger.warning("%s: this small model was trained on synthetic scenes only, not on photos", model_type)
        model = cls.from_config(cls.default_config(model_type).model)
        if not model.load_report.loaded:
            logger.warning("%s: no weights are known for this type; load a checkpoint, or train it", model_type)
        return model
