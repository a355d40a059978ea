"""The frozen language models of stage 2 behind one small interface: OPT (decoder only) and FlanT5 (encoder-decoder).

Each reads an image as a prefix of embeddings, then a prompt, and says a target. The weights come from the hub, a local
folder in its format, or a shipped one (``assets://mini/opt``).

B: texts, Q: queries, L: width of the language model, T: tokens, V: vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PretrainedConfig, T5Config, T5ForConditionalGeneration, T5TokenizerFast

from lavis_xformer.assets import resolve
from lavis_xformer.errors import UserError, nearest
from lavis_xformer.losses import NO_TARGET, language_modelling, token_losses
from lavis_xformer.models.frozen import (
    DTYPES,
    Precision,
    cast,
    compute_dtype,
    enlarge_gradients,
    freeze,
    own_autocast,
    unscaled_half,
)
from lavis_xformer.models.towers import offline_error

Dialogue = Sequence[tuple[str, str]]  # prompts, each with the target that follows it
L = TypeVar("L", bound="LanguageModel")


class LanguageModel(ABC):
    """A frozen language model that continues an image.

    It is no module itself, so that the model which owns it can register the weights under LAVIS's names.
    """

    #: "opt" or "t5": the hub's model type, and the stem of the configuration key and of the weights' names
    kind: ClassVar[str]
    #: what LAVIS runs it in on a GPU
    DEFAULT_PRECISION: ClassVar[Precision]
    #: what VQA generates with, as LAVIS's ``predict_answers``
    DEFAULT_LENGTH_PENALTY: ClassVar[float]

    def __init__(
        self, *, model: Any, tokenizer: Any, precision: Precision | None = None, max_txt_len: int = 32
    ) -> None:
        """Freeze the model.

        Args:
            model: transformers' or LAVIS's.
            tokenizer: the model's.
            precision: on a GPU; the model's own default where it is None. Anywhere else it runs in fp32.
            max_txt_len: longest target in tokens; prompts are never cut.
        """
        self.model: Any = freeze(model)
        self.tokenizer = tokenizer
        self.precision: Precision = precision or self.DEFAULT_PRECISION
        self.max_txt_len = max_txt_len

    @classmethod
    def from_source(cls: type[L], name: str, *, precision: Precision | None = None, max_txt_len: int = 32) -> L:
        """Load model and tokenizer.

        Args:
            name: hub id, local folder, or ``assets://...``.
            precision: see ``__init__``.
            max_txt_len: see ``__init__``.

        Raises:
            UserError: there is no such model, it can't be fetched, or it is of another kind.
        """
        key = f"model.{cls.kind}_model"
        if precision is not None and precision not in DTYPES:
            raise UserError(f"model.llm_precision: '{precision}'; {nearest(str(precision), DTYPES)}")
        try:
            path = str(resolve(name))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        try:
            config, _ = PretrainedConfig.get_config_dict(path)
            if (found := config.get("model_type")) != cls.kind:
                raise UserError(f"{key}: '{name}' is a model of type '{found}', not '{cls.kind}'")
            model, report = cls.load(path)
            tokenizer = cls.load_tokenizer(path)
        except OSError as error:
            raise offline_error(name, f"{cls.kind}_model", error) from error
        if problems := [*report["missing_keys"], *report["mismatched_keys"]]:
            raise UserError(f"{key}: '{name}' lacks weights, or has some of another shape: {problems[:5]}")
        return cls(model=model, tokenizer=tokenizer, precision=precision, max_txt_len=max_txt_len)

    @staticmethod
    @abstractmethod
    def load(path: str) -> tuple[Any, dict[str, Any]]:
        """Load the model in the precision of its file, and transformers' report."""

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
            Logits (B, T, V) and tokens (B, T), :data:`NO_TARGET` where a token is none of a target's.
        """

    @abstractmethod
    def continue_(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> Tensor:
        """Continue image (B, Q, L) and prompt: token ids (B * ``num_return_sequences``, T), without the prompt's."""

    def generate(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """Continue image and prompt.

        Args:
            visual: (B, Q, L).
            prompts: B strings.
            options: of transformers' ``generate``, ``do_sample``, ``num_beams`` and ``num_return_sequences`` included.

        Returns:
            B * ``num_return_sequences`` texts, those of an image side by side.

        Raises:
            UserError: more tokens than the model reads.
        """
        with self.running():
            ids = self.continue_(visual, prompts, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def loss(self, visual: Tensor, dialogues: Sequence[Dialogue], weights: Tensor | None = None) -> Tensor:
        """Loss of the targets after image and prompt, for :meth:`predict`'s arguments and :func:`language_modelling`'s.

        The mean over a batch's tokens has gradients of about 1e-8, which are zero in fp16: there it passes that of the
        sum.
        """
        prefix = visual.float().view_as(visual)
        logits, labels = self.predict(prefix, dialogues)
        logits = logits.float()
        if unscaled_half(visual.device, compute_dtype(visual.device, self.precision)):
            enlarge_gradients(prefix, logits, factor=(labels != NO_TARGET).sum())
        return language_modelling(logits, labels, weights)

    @torch.no_grad()
    def rank(self, visual: Tensor, prompts: Sequence[str], answers: Sequence[str], *, candidates: int) -> list[str]:
        """Choose the likeliest answer to each prompt, as LAVIS's ``blip_vqa`` does.

        Args:
            visual: (B, Q, L).
            prompts: B strings, none of them empty.
            answers: to choose from, the same for all prompts.
            candidates: how many of them, those with the likeliest first tokens, are read to their ends.

        Returns:
            B answers, each the one whose tokens have the greatest likelihood together.
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

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Bring the weights to their precision on this device, and run under autocast there.

        Whatever autocast is on outside, the model computes in its own precision on a GPU.
        """
        device = self.model.device
        dtype = compute_dtype(device, self.precision)
        if any(parameter.dtype != dtype for parameter in self.model.parameters()):
            cast(self.model, dtype)
        with own_autocast(device, dtype):
            yield

    def embed(self, visual: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, Q, L), then text (B, T): embeddings (B, Q + T, L) and attention mask (B, Q + T)."""
        words = self.model.get_input_embeddings()(ids)  # (B, T, L)
        return torch.cat([visual.to(words.dtype), words], dim=1), prefix_mask(visual, mask)


class CachedOPT(OPTForCausalLM):
    """LAVIS's OPT, whose key/value cache is lost under transformers >= 4.26, which has renamed it."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, past: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Take the cache under its new name too."""
        cache = past if past_key_values is None else past_key_values
        return super().prepare_inputs_for_generation(input_ids, past=cache, **kwargs)


class OptLanguage(LanguageModel):
    """OPT: image, ``</s>``, prompt, target and a line break, as in BLIP-2; more prompts and targets may follow."""

    kind = "opt"
    DEFAULT_PRECISION: ClassVar[Precision] = "fp16"
    DEFAULT_LENGTH_PENALTY = 0.0

    def __init__(self, **parts: Any) -> None:
        """Take what :class:`LanguageModel` takes."""
        super().__init__(**parts)
        self.tokenizer.padding_side = "left"  # prompts of several lengths must all end where the answer begins
        self.end_id = self.tokenizer("\n", add_special_tokens=False).input_ids[0]

    @staticmethod
    def load(path: str) -> tuple[Any, dict[str, Any]]:
        """Load :class:`CachedOPT`."""
        return CachedOPT.from_pretrained(path, torch_dtype="auto", output_loading_info=True)

    @staticmethod
    def load_tokenizer(path: str) -> Any:
        """Load GPT-2's tokenizer, as LAVIS does."""
        return AutoTokenizer.from_pretrained(path, use_fast=False)

    def predict(self, visual: Tensor, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
        """See :class:`LanguageModel`; without a prompt the start token counts as a target, as in BLIP-2."""
        ids, mask, labels = (part.to(visual.device) for part in self.encode(dialogues))  # (B, T)
        self._check_length(visual.shape[1] + ids.shape[1])
        with self.running():
            embeds, attention = self.embed(visual, ids, mask)
            logits = self.model(inputs_embeds=embeds, attention_mask=attention, use_cache=False).logits
        start = max(visual.shape[1], 1)  # without an image there is nothing to predict the first token from
        return logits[:, start - 1 : -1], labels[:, start - visual.shape[1] :]

    def encode(self, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask and labels (B, T), padded on the right."""
        rows, labels = [], []
        for dialogue in dialogues:
            row: list[int] = []
            wanted: list[int] = []
            for prompt, target in dialogue:
                asked = self.tokenizer(prompt, add_special_tokens=not row).input_ids  # </s> first
                said = self.tokenizer(f"{target}\n", add_special_tokens=False).input_ids[: self.max_txt_len - 1]
                row += asked + said
                wanted += ([NO_TARGET] * len(asked) if prompt else asked) + said
            rows.append(torch.tensor(row))
            labels.append(torch.tensor(wanted))
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids, mask, pad_sequence(labels, batch_first=True, padding_value=NO_TARGET)

    def continue_(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> Tensor:
        """See :class:`LanguageModel`; ``min_length`` counts the prompt too, ``min_new_tokens`` doesn't."""
        text = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(visual.device)
        self._check_length(visual.shape[1] + text.input_ids.shape[1] + options["max_new_tokens"])
        copies = options["num_return_sequences"] if options["do_sample"] else options["num_beams"]
        ids = self.model.generate(
            input_ids=text.input_ids,
            query_embeds=visual.to(self.model.dtype).repeat_interleave(copies, dim=0),
            attention_mask=prefix_mask(visual, text.attention_mask),
            eos_token_id=self.end_id,
            **options,
        )
        return ids[:, text.input_ids.shape[1] :]

    def _check_length(self, tokens: int) -> None:
        limit = self.model.config.max_position_embeddings
        if tokens > limit:
            raise UserError(f"image, prompt and text take {tokens} tokens, but model.opt_model reads at most {limit}")


class T5Language(LanguageModel):
    """FlanT5: the encoder reads image and prompt, the decoder says the target; every turn of a dialogue by itself."""

    kind = "t5"
    DEFAULT_PRECISION: ClassVar[Precision] = "bf16"  # FlanT5 overflows in fp16
    DEFAULT_LENGTH_PENALTY = -1.0

    @staticmethod
    def load(path: str) -> tuple[Any, dict[str, Any]]:
        """Load transformers' own T5, whose cache works; its activation is exact GELU, as LAVIS has it."""
        config = T5Config.from_pretrained(path)
        config.dense_act_fn = "gelu"
        return T5ForConditionalGeneration.from_pretrained(
            path, config=config, torch_dtype="auto", output_loading_info=True
        )

    @staticmethod
    def load_tokenizer(path: str) -> Any:
        """Load T5's tokenizer."""
        return T5TokenizerFast.from_pretrained(path)

    def predict(self, visual: Tensor, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
        """See :class:`LanguageModel`; a row for each turn, of all dialogues one after the other."""
        prompts, targets = zip(*(turn for dialogue in dialogues for turn in dialogue), strict=True)
        turns = torch.tensor([len(dialogue) for dialogue in dialogues], device=visual.device)
        visual = visual.repeat_interleave(turns, dim=0)  # (turns, Q, L)
        asked = self._tokenize(prompts, visual)
        said = self._tokenize(targets, visual, truncation=True, max_length=self.max_txt_len)
        labels = said.input_ids.masked_fill(said.attention_mask == 0, NO_TARGET)  # (B, T)
        with self.running():
            embeds, attention = self.embed(visual, asked.input_ids, asked.attention_mask)
            logits = self.model(
                inputs_embeds=embeds,
                attention_mask=attention,
                decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
                decoder_attention_mask=said.attention_mask,
                use_cache=False,
            ).logits  # (B, T, V)
        return logits, labels

    def loss(self, visual: Tensor, dialogues: Sequence[Dialogue], weights: Tensor | None = None) -> Tensor:
        """See :class:`LanguageModel`; every turn has its dialogue's weight."""
        if weights is not None:
            weights = torch.cat([w.expand(len(turns)) for w, turns in zip(weights, dialogues, strict=True)])
        return super().loss(visual, dialogues, weights)

    def continue_(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> Tensor:
        """See :class:`LanguageModel`."""
        text = self._tokenize(prompts, visual)
        embeds, attention = self.embed(visual, text.input_ids, text.attention_mask)
        return self.model.generate(inputs_embeds=embeds, attention_mask=attention, **options)

    def _tokenize(self, texts: Sequence[str], visual: Tensor, **options: Any) -> Any:
        return self.tokenizer(list(texts), padding=True, return_tensors="pt", **options).to(visual.device)


def prefix_mask(visual: Tensor, mask: Tensor) -> Tensor:
    """Attention mask (B, Q + T) of an image (B, Q, L), all visible, and a text's mask (B, T)."""
    return torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)
