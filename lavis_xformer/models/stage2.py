"""X-Former's stage 2: Z' -> one linear layer -> prefix of a frozen language model (arXiv 2407.13851, section 3).

The loss is language modelling, on captions as in BLIP-2 or on answers to questions; MAE sees the whole image. The
paper's ablation "reconstruction in both stages" is ``loss_weights: {rec: 1}``.

B: images, A: texts (as many as images, or several answers for each), Q: queries, D: width of the Q-Former,
L: width of the language model, N: image patches.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from omegaconf import DictConfig
from torch import Tensor
from typing_extensions import Self

from lavis_xformer import losses
from lavis_xformer.errors import UserError
from lavis_xformer.models.checkpoints import PROJECTION, load_pretrained
from lavis_xformer.models.generation import GenerativeModel
from lavis_xformer.models.language import LanguageModel
from lavis_xformer.models.opt import OptLanguage
from lavis_xformer.models.parts import build_parts, given, options_of, weights_of
from lavis_xformer.models.samples import take
from lavis_xformer.models.t5 import T5Language
from lavis_xformer.models.texts import Prompts, texts_to_learn


class XFormerStage2(GenerativeModel):
    """The second-stage model over any :class:`LanguageModel`."""

    LANGUAGE: ClassVar[type[LanguageModel]]
    STAGE1_WEIGHTS = (
        r"(vision_proj|text_proj|itm_head|itg_reader)\.|temp$|Qformer\.cls\."
        r"|Qformer\.bert\.embeddings\.(word|position)_embeddings\."
        r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
    )
    NEW_WEIGHTS = PROJECTION
    CONFIG_KEYS = GenerativeModel.CONFIG_KEYS | {"llm_precision"}
    #: by default
    LOSS_WEIGHTS: ClassVar[dict[str, float]] = {"lm": 1.0, "rec": 0.0}

    def __init__(
        self,
        *,
        mask_ratio: float = 0.5,
        loss_weights: dict[str, float] | None = None,
        prefix_lm: bool = False,
        **parts: Any,
    ) -> None:
        """Add what the losses need.

        Args:
            mask_ratio: share of the patches that a second pass hides from MAE, if there is a reconstruction loss.
            loss_weights: of ``lm``, 1 by default, and of ``rec``, 0 by default.
            prefix_lm: in training, put a random beginning of each caption into the prompt, see :func:`texts.split`.
            parts: of :class:`GenerativeModel`.

        Raises:
            UserError: a wrong weight, weights with which nothing would be trained, or a mask ratio outside (0, 1).
        """
        super().__init__(**parts)
        if not 0 < mask_ratio < 1:
            raise UserError(f"model.mask_ratio is {mask_ratio}; it must lie between 0 and 1")
        self.prefix_lm = prefix_lm
        self.weigh_losses(weights_of(loss_weights, self.LOSS_WEIGHTS), mask_ratio)

    def forward(
        self, samples: dict[str, Any], *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            samples: ``image`` (B, 3 or 6, S, S) and one of

                * ``text_input``: B captions;
                * ``text_input`` and ``text_output``: B prompts and their continuations, as in LAVIS's ``Blip2T5``,
                  with a space between them if neither has one;
                * ``text_input``: B questions, with ``answer`` (A strings), ``n_answers`` (B,) and ``weight`` (A,) as
                  LAVIS's VQA datasets have them; or with ``answer``, B strings. The answer to "" is a caption. If
                  a question is a list of several, so is its answer: a dialogue, in which OPT reads image and earlier
                  turns once, and T5 each turn by itself.
            noise: (B, N), decides which patches MAE doesn't see; drawn if None.
            generator: decides where ``prefix_lm`` splits captions.

        Returns:
            Scalars: ``loss``, the weighted sum; ``loss_lm``; ``loss_rec`` where M' is reconstructed.

        Raises:
            UserError: texts that don't fit the images, or questions (``question_id``) without answers.
        """
        image = take(samples, "image")
        prompts = Prompts(self.prompt, self.vqa_prompt, splits=self.prefix_lm and self.training)
        texts = texts_to_learn(samples, prompts, generator)
        tokens = self.encode_image(image)
        zq = self.query_image(tokens.clip).last_hidden_state  # Zq (B, Q, D)
        z, _ = self.fusion.refine(zq, tokens.mae_tokens)  # Z' (B, Q, D)
        prefix = self.projection(z)  # (B, Q, L)
        if texts.images is not None:
            prefix = prefix[texts.images.to(prefix.device)]  # (A, Q, L)
        weights = None if texts.weights is None else texts.weights.to(prefix.device)
        terms = {"lm": self.language.loss(prefix, texts.dialogues, weights)}
        if self.reconstructs:
            seen = self.mask_again(tokens, mask_ratio=self.mask_ratio, noise=noise)
            terms["rec"] = self.reconstruction_loss(self.fusion.align(seen.mae_tokens, zq), seen)  # of M'
        return losses.weighted(terms, self.loss_weights)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Self:
        """Build the model from a ``model`` configuration and load the checkpoints it names.

        Raises:
            UserError: a name, folder or file in the configuration is wrong.
        """
        language = cls.LANGUAGE.from_source(
            cfg[f"{cls.LANGUAGE.kind}_model"],
            precision=cfg.get("llm_precision"),
            **given(cfg, "max_txt_len"),
        )
        model = cls(language=language, **given(cfg, *options_of(cls)), **build_parts(cfg))
        model.load_report = load_pretrained(model, cfg)
        return model


@registry.register_model("xformer_opt")
class XFormerOPT(XFormerStage2):
    """X-Former with OPT.

    Usage:
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("xformer_opt", "mini", is_eval=True)
        >>> model.generate({"image": vis["eval"](image).unsqueeze(0)})
    """

    LANGUAGE = OptLanguage
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "mini": "models/xformer_opt_mini.yaml",
        "pretrain_opt2.7b": "models/xformer_opt_pretrain_opt2.7b.yaml",
        "pretrain_opt6.7b": "models/xformer_opt_pretrain_opt6.7b.yaml",
    }
    CONFIG_KEYS = XFormerStage2.CONFIG_KEYS | {"opt_model"}


@registry.register_model("xformer_t5")
class XFormerT5(XFormerStage2):
    """X-Former with FlanT5."""

    LANGUAGE = T5Language
    DEFAULT_MODEL_TYPE = None  # no T5 is shipped
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "mini_t5": "models/xformer_t5_mini.yaml",
        "pretrain_flant5xl": "models/xformer_t5_pretrain_flant5xl.yaml",
    }
    CONFIG_KEYS = XFormerStage2.CONFIG_KEYS | {"t5_model"}
