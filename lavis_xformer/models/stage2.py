"""X-Former's stage 2: Z' -> one linear layer -> prefix of a frozen language model (arXiv 2407.13851, section 3).

The loss is language modelling, on captions as in BLIP-2 or on answers to questions; MAE sees the whole image. The
paper's ablation "reconstruction in both stages" is ``loss_weights: {rec: 1}``.

B: images, A: texts (as many as images, or several answers for each), Q: queries, D: width of the Q-Former,
L: width of the language model, N: image patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from lavis.common.registry import registry
from omegaconf import DictConfig
from torch import Tensor
from typing_extensions import Self

from lavis_xformer import losses
from lavis_xformer.errors import UserError
from lavis_xformer.models.checkpoints import PROJECTION, load_pretrained
from lavis_xformer.models.generation import GenerativeModel, ask
from lavis_xformer.models.language import Dialogue, LanguageModel
from lavis_xformer.models.opt import OptLanguage
from lavis_xformer.models.parts import build_parts, given, weights_of
from lavis_xformer.models.samples import one_per_image, take, texts_of
from lavis_xformer.models.t5 import T5Language

#: keys that the constructor takes
OPTIONS = "prompt vqa_prompt vqa_length_penalty apply_lemmatizer mask_ratio loss_weights prefix_lm".split()


class Texts(NamedTuple):
    """Prompts and targets of the language model: A dialogues, most of them of one turn."""

    dialogues: Sequence[Dialogue]
    weights: Tensor | None = None  #: (A,)
    images: Tensor | None = None  #: (A,) the image of each text; None if each has its own


class XFormerStage2(GenerativeModel):
    """The second-stage model over any :class:`LanguageModel`."""

    LANGUAGE: ClassVar[type[LanguageModel]]
    STAGE1_WEIGHTS = (
        r"(vision_proj|text_proj|itm_head|itg_reader)\.|temp$|Qformer\.cls\."
        r"|Qformer\.bert\.embeddings\.(word|position)_embeddings\."
        r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
    )
    NEW_WEIGHTS = PROJECTION
    CONFIG_KEYS = GenerativeModel.CONFIG_KEYS | {"llm_precision", *OPTIONS}

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
            prefix_lm: in training, put a random beginning of each caption into the prompt, see :func:`split`.
            parts: of :class:`GenerativeModel`.

        Raises:
            UserError: a weight for a loss that doesn't exist, or a mask ratio outside (0, 1).
        """
        super().__init__(**parts)
        if not 0 < mask_ratio < 1:
            raise UserError(f"model.mask_ratio is {mask_ratio}; it must lie between 0 and 1")
        self.mask_ratio = mask_ratio
        self.prefix_lm = prefix_lm
        self.loss_weights = weights_of(loss_weights, {"lm": 1.0, "rec": 0.0})

    @property
    def reconstructs(self) -> bool:
        """Whether there is an M' to reconstruct from, and ``rec`` has a weight."""
        return self.fusion.aligns_mae and self.mae is not None and self.loss_weights["rec"] > 0

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
        texts = self._texts(samples, generator)
        tokens = self.encode_image(image)
        zq = self.query_image(tokens.clip).last_hidden_state  # Zq (B, Q, D)
        z, _ = self.fusion.refine(zq, tokens.mae_tokens)  # Z' (B, Q, D)
        prefix = self.projection(z)  # (B, Q, L)
        if texts.images is not None:
            prefix = prefix[texts.images]  # (A, Q, L)
        terms = {"lm": self.language.loss(prefix, texts.dialogues, texts.weights)}
        if self.reconstructs:
            seen = self.mask_again(tokens, image, mask_ratio=self.mask_ratio, noise=noise)
            terms["rec"] = self.reconstruction_loss(self.fusion.align(seen.mae_tokens, zq), seen)  # of M'
        return losses.weighted(terms, self.loss_weights)

    def _texts(self, samples: dict[str, Any], generator: torch.Generator | None) -> Texts:
        """Prompts, which are excluded from the loss, and targets of a batch."""
        if "question_id" in samples and None in samples.get("answer", [None]):
            raise UserError("samples['question_id']: questions without answers, which can't be scored; leave them out")
        if "answer" in samples and "text_output" not in samples:
            return self._answers(samples, generator)
        count = len(samples["image"])
        texts = texts_of(samples, count)
        if "text_output" in samples:
            said = one_per_image(samples["text_output"], count, name="samples['text_output']")
            return Texts([[(text, spaced(text, target))] for text, target in zip(texts, said, strict=True)])
        return Texts([[self._caption(text, generator)] for text in texts])

    def _caption(self, text: str, generator: torch.Generator | None) -> tuple[str, str]:
        """A caption's prompt and target; in training, ``prefix_lm`` moves part of it to the prompt."""
        caption = continuation(self.prompt, text)
        return split(self.prompt, caption, generator) if self.prefix_lm and self.training else (self.prompt, caption)

    def _answers(self, samples: dict[str, Any], generator: torch.Generator | None) -> Texts:
        count, questions = len(samples["image"]), take(samples, "text_input")
        if not (isinstance(questions, list) and any(isinstance(question, list) for question in questions)):
            questions = one_per_image(questions, count, name="samples['text_input']")
        each = samples.get("n_answers")
        each = torch.ones(len(questions), dtype=torch.long) if each is None else each.cpu()
        answers = samples["answer"]
        if not len(each) == len(questions) == count or int(each.sum()) != len(answers):
            raise UserError(
                f"samples['answer'] has {len(answers)} answers to {len(questions)} questions about {count} images; "
                "samples['n_answers'] must say how many belong to each"
            )
        images = torch.arange(len(questions)).repeat_interleave(each)  # (A,)
        weights = samples.get("weight")
        asked = [questions[i] for i in images.tolist()]
        return Texts(
            dialogues=[self._dialogue(*turns, generator) for turns in zip(asked, answers, strict=True)],
            weights=None if weights is None else weights.to(self.device),
            images=images.to(self.device),
        )

    def _dialogue(
        self, questions: str | Sequence[str], answers: str | Sequence[str], generator: torch.Generator | None
    ) -> Dialogue:
        """Question and answer, or several of each, as prompts and targets."""
        if isinstance(questions, str) and isinstance(answers, str):
            questions, answers = [questions], [answers]
        elif isinstance(questions, str) or isinstance(answers, str) or not len(questions) == len(answers) > 0:
            raise UserError(
                f"samples['answer']: {answers!r:.80} does not answer {questions!r:.80}; a list of questions needs a "
                "list of as many answers"
            )
        return [
            (ask(self.vqa_prompt, question), f" {answer}") if question else self._caption(answer, generator)
            for question, answer in zip(questions, answers, strict=True)
        ]

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
        model = cls(language=language, **given(cfg, *OPTIONS), **build_parts(cfg))
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


def continuation(prompt: str, caption: str) -> str:
    """The caption as it follows the prompt, which the text processor may already have prepended."""
    return caption[len(prompt) :] if caption.startswith(prompt) else spaced(prompt, caption)


def spaced(before: str, after: str) -> str:
    """``after`` as it follows ``before``: with a space between them if neither has one."""
    joined = not before or before[-1].isspace() or not after or after[0].isspace()
    return after if joined else f" {after}"


def split(prompt: str, caption: str, generator: torch.Generator | None = None) -> tuple[str, str]:
    """Move a random number of the caption's words, but not all, to the prompt.

    Prefix language modelling, with which BLIP-2 trains encoder-decoder models (arXiv 2301.12597, section 3.3, which
    doesn't say where it splits).
    """
    words = caption.split(" ")
    cut = int(torch.randint(len(words), (), generator=generator))
    return prompt + " ".join(words[:cut]), (" " if cut else "") + " ".join(words[cut:])
