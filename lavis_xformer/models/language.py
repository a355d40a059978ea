"""Stage 2's interface to its frozen language model, implemented by OPT (``opt.py``) and FlanT5 (``t5.py``).

Each reads an image as a prefix of embeddings, then a prompt, and writes text. The weights come from the hub, a local
folder in its format, or a shipped one (``assets://mini/opt``).

B: texts, Q: queries, L: width of the language model, T: tokens, V: vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import Self

from lavis_xformer.assets import resolve
from lavis_xformer.distributed import token_mean
from lavis_xformer.errors import UserError, one_of, text
from lavis_xformer.losses import NO_TARGET, language_modelling, token_losses
from lavis_xformer.models.frozen import (
    DTYPES,
    Precision,
    computing,
    enlarge_gradients,
    freeze,
    unscaled_half,
)
from lavis_xformer.models.weight_files import offline_error

Dialogue = Sequence[tuple[str, str]]  # prompts, each with the target that follows it


class LanguageModel(ABC):
    """A frozen language model that continues an image.

    It is not an ``nn.Module`` itself, so that the model that owns it can register the weights under LAVIS's names.
    """

    #: "opt" or "t5": the hub's model type, and the stem of the configuration key and of the weights' names
    kind: ClassVar[str]
    #: LAVIS's precision for it on a GPU
    DEFAULT_PRECISION: ClassVar[Precision]
    #: length penalty for VQA, as in LAVIS's ``predict_answers``
    DEFAULT_LENGTH_PENALTY: ClassVar[float]

    def __init__(
        self, *, model: Any, tokenizer: Any, precision: Precision | None = None, max_txt_len: int = 32
    ) -> None:
        """Freeze the model.

        Args:
            model: transformers' or LAVIS's.
            tokenizer: the model's.
            precision: on a GPU; the model's own default if None. On other devices it runs in fp32.
            max_txt_len: longest target in tokens; prompts are never truncated.
        """
        self.model: Any = freeze(model)
        self.tokenizer = tokenizer
        self.precision: Precision = precision or self.DEFAULT_PRECISION
        self.max_txt_len = max_txt_len

    @classmethod
    def from_source(cls, name: str, *, precision: Precision | None = None, max_txt_len: int = 32) -> Self:
        """Load model and tokenizer.

        Args:
            name: hub id, local folder, or ``assets://...``.
            precision: see ``__init__``.
            max_txt_len: see ``__init__``.

        Raises:
            UserError: there is no such model, it can't be fetched, or it is of another kind.
        """
        key = f"model.{cls.kind}_model"
        if precision is not None:
            one_of("model.llm_precision", precision, DTYPES)
        try:
            path = str(resolve(text(key, name)))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        try:
            config, _ = PretrainedConfig.get_config_dict(path)
            if (found := config.get("model_type")) != cls.kind:
                raise UserError(f"{key}: '{name}' is a model of type '{found}', not '{cls.kind}'")
            model, report = cls.load(path)
            tokenizer = cls.load_tokenizer(path)
        except (OSError, SafetensorError) as error:
            raise offline_error(name, f"{cls.kind}_model", error) from error
        if problems := [*report["missing_keys"], *report["mismatched_keys"]]:
            raise UserError(f"{key}: '{name}' lacks weights, or has some of another shape: {problems[:5]}")
        if tokenizer.pad_token_id is None:
            raise UserError(f"{key}: the tokenizer of '{name}' has no pad_token; add it to its tokenizer_config.json")
        needed = max(tokenizer.vocab_size, tokenizer.pad_token_id + 1)  # T5's sentinels are never used
        if needed > (known := model.get_input_embeddings().num_embeddings):
            raise UserError(f"{key}: the tokenizer of '{name}' has {needed} tokens, its model only {known}")
        return cls(model=model, tokenizer=tokenizer, precision=precision, max_txt_len=max_txt_len)

    @staticmethod
    @abstractmethod
    def load(path: str) -> tuple[Any, dict[str, Any]]:
        """Load the model in the precision of its file; also returns transformers' loading report."""

    @staticmethod
    @abstractmethod
    def load_tokenizer(path: str) -> Any:
        """Load its tokenizer."""

    @abstractmethod
    def predict(self, visual: Tensor, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
        """Predict each token of the targets from image, prompt and the tokens before it.

        Args:
            visual: (B, Q, L).
            dialogues: B of them, each of one or more prompts ("" for none) with their targets.

        Returns:
            Logits (B, T, V) and tokens (B, T), :data:`NO_TARGET` where a token belongs to no target; T5 gives a row
            per turn of the dialogues.
        """

    @abstractmethod
    def continue_(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> Tensor:
        """Continue image (B, Q, L) and prompt: token ids (B * ``num_return_sequences``, T), without the prompt's."""

    def generate(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """Continue image and prompt.

        Args:
            visual: (B, Q, L).
            prompts: B strings.
            options: of transformers' ``generate``, including ``do_sample``, ``num_beams``, ``num_return_sequences``.

        Returns:
            B * ``num_return_sequences`` texts, those of an image side by side; no text depends on another.

        Raises:
            UserError: more tokens than the model reads, or a minimum that can't be reached.
        """
        with self.running():
            ids = self.continue_(visual, prompts, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def answer(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """Continue as :meth:`generate` does, by beam search, but never counting the prompt, for any model."""
        return self.generate(visual, prompts, do_sample=False, num_return_sequences=1, **options)

    def loss(self, visual: Tensor, dialogues: Sequence[Dialogue], weights: Tensor | None = None) -> Tensor:
        """Mean loss of the targets' tokens after image and prompt.

        Gradients of the mean over a batch's tokens are about 1e-8, which underflows in fp16: within an fp16 model they
        are scaled up to those of the sum.

        Args:
            visual: (B, Q, L).
            dialogues: as in :meth:`predict`.
            weights: (B,), a text of weight w counts w times; None weights all texts equally, as in BLIP-2.
        """
        prefix = visual.float().view_as(visual)  # a tensor of its own, whose hook scales no other gradients
        logits, labels = self.predict(prefix, dialogues)
        logits = logits.float()
        if unscaled_half(visual.device, self.precision):
            enlarge_gradients(prefix, logits, factor=(labels != NO_TARGET).sum())
        counts = (labels != NO_TARGET).float()  # (B, T)
        if weights is not None:
            counts = counts * weights[:, None]
        return token_mean(language_modelling(logits, labels, counts), counts.sum())

    @torch.no_grad()
    def rank(self, visual: Tensor, prompts: Sequence[str], answers: Sequence[str], *, candidates: int) -> list[str]:
        """Choose the likeliest answer to each prompt, as LAVIS's ``blip_vqa`` does.

        Args:
            visual: (B, Q, L).
            prompts: B strings, none of them empty.
            answers: to choose from, the same for all prompts.
            candidates: how many of them, those with the likeliest first tokens, are scored in full.

        Returns:
            B answers, each the one with the greatest total log-likelihood.
        """
        starts = [self.tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in answers]
        logits, labels = self.predict(visual, [[(prompt, answers[0])] for prompt in prompts])
        begin = (labels != NO_TARGET).int().argmax(dim=1)  # (B,)
        first = logits.take_along_dim(begin[:, None, None], dim=1)[:, 0]  # (B, V)
        likeliest = first[:, starts].topk(min(candidates, len(answers))).indices  # (B, candidates)
        chosen = []
        for image, prompt, indices in zip(visual, prompts, likeliest.tolist(), strict=True):
            texts = [answers[index] for index in indices]
            images = image.expand(len(texts), -1, -1)
            losses = token_losses(*self.predict(images, [[(prompt, text)] for text in texts])).sum(dim=1)
            chosen.append(texts[int(losses.argmin())])
        return chosen

    @property
    def width(self) -> int:
        """L."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Cast all weights to their precision on this device; return the context to run the model in."""
        return computing(self.model, self.model.device, self.precision, layers=(nn.Module,))

    def embed(self, visual: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, Q, L), then text (B, T) -> embeddings (B, Q + T, L); mask (B, S) -> attention mask (B, Q + S)."""
        words = self.model.get_input_embeddings()(ids)  # (B, T, L)
        return torch.cat([visual.to(words.dtype), words], dim=1), prefix_mask(visual, mask)


def prefix_mask(visual: Tensor, mask: Tensor) -> Tensor:
    """Attention mask (B, Q + T) of an image (B, Q, L), all visible, and a text's mask (B, T)."""
    return torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)


def check_fewest(options: dict[str, Any], counted: int) -> None:
    """Refuse a ``min_length`` that ``counted`` tokens plus ``max_new_tokens`` can't reach, or more new tokens."""
    new = options["max_new_tokens"]
    for name, most in (("min_length", counted + new), ("min_new_tokens", new)):
        if (fewest := options.get(name) or 0) > most:
            raise UserError(f"{name} is {fewest}, but at most {most} tokens count; lower it or raise the maximum")
