"""FlanT5 as stage 2's frozen language model: the encoder reads image and prompt, the decoder writes the target.

B: texts, Q: queries, L: width of the language model, T: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

from lavis_xformer.losses import NO_TARGET
from lavis_xformer.models.frozen import Precision
from lavis_xformer.models.language import Dialogue, LanguageModel, check_fewest
from lavis_xformer.models.weight_files import REPORTING


class T5Language(LanguageModel):
    """FlanT5: the encoder reads image and prompt, the decoder writes the target; dialogue turns are independent."""

    kind = "t5"
    DEFAULT_PRECISION: ClassVar[Precision] = "bf16"  # FlanT5 overflows in fp16
    DEFAULT_LENGTH_PENALTY = -1.0

    @staticmethod
    def load(path: str) -> tuple[Any, dict[str, Any]]:
        """Load transformers' own T5, whose cache works, with exact GELU in FlanT5's place for it, as in LAVIS."""
        config = T5Config.from_pretrained(path)
        if config.dense_act_fn == "gelu_new":  # FlanT5's; another T5 keeps its own
            config.dense_act_fn = "gelu"
        return T5ForConditionalGeneration.from_pretrained(path, config=config, torch_dtype="auto", **REPORTING)

    @staticmethod
    def load_tokenizer(path: str) -> Any:
        """Load T5's tokenizer."""
        return T5TokenizerFast.from_pretrained(path)

    def predict(self, visual: Tensor, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
        """See :class:`LanguageModel`; one row per turn, dialogue after dialogue."""
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
            turns = torch.tensor([len(dialogue) for dialogue in dialogues], device=weights.device)
            weights = weights.repeat_interleave(turns)
        return super().loss(visual, dialogues, weights)

    def continue_(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> Tensor:
        """See :class:`LanguageModel`; ``min_length`` counts T5's start token, as in LAVIS."""
        check_fewest(options, 1)
        text = self._tokenize(prompts, visual)
        embeds, attention = self.embed(visual, text.input_ids, text.attention_mask)
        return self.model.generate(inputs_embeds=embeds, attention_mask=attention, **options)

    def _tokenize(self, texts: Sequence[str], visual: Tensor, **options: Any) -> Any:
        return self.tokenizer(list(texts), padding=True, return_tensors="pt", **options).to(visual.device)
