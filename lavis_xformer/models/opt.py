"""OPT as stage 2's frozen language model: a decoder that continues image and prompt.

B: texts, Q: queries, L: width of the language model, T: tokens, S: tokens including cached ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lavis.models.blip2_models.modeling_opt import OPTAttention, OPTForCausalLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from lavis_xformer.errors import UserError
from lavis_xformer.losses import NO_TARGET
from lavis_xformer.models.cached import Cached
from lavis_xformer.models.frozen import Precision
from lavis_xformer.models.language import Dialogue, LanguageModel, check_fewest
from lavis_xformer.models.weight_files import REPORTING


class OptKernelAttention(OPTAttention):
    """Attends with torch's kernel instead of LAVIS's own code, which stores every attention map."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor,
        **unused: Any,
    ) -> tuple[Tensor, None, tuple[Tensor, Tensor]]:
        """(B, T, L) and a mask (B, 1, T, S) to add -> the same shape, no map, and keys and values (B, heads, S, .)."""
        query, key, value = (
            self._shape(project(hidden_states), -1, len(hidden_states))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, T, L / heads)
        if past_key_value is not None:
            key, value = torch.cat([past_key_value[0], key], dim=2), torch.cat([past_key_value[1], value], dim=2)
        mask = attention_mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)  # no -inf
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None, (key, value)


def attend_by_kernel(model: OPTForCausalLM) -> OPTForCausalLM:
    """Exchange the attention of all layers, in place, for :class:`OptKernelAttention`; return the model."""
    for module in model.modules():
        if isinstance(module, OPTAttention):
            module.__class__ = OptKernelAttention
    return model


class CachedOPT(Cached, OPTForCausalLM):
    """LAVIS's OPT, with its key/value cache."""


class OptLanguage(LanguageModel):
    """OPT: image, ``</s>``, prompt, target and a line break, as in BLIP-2; more prompts and targets may follow."""

    kind = "opt"
    DEFAULT_PRECISION: ClassVar[Precision] = "fp16"
    DEFAULT_LENGTH_PENALTY = 0.0

    def __init__(self, **parts: Any) -> None:
        """Take what :class:`LanguageModel` takes."""
        super().__init__(**parts)
        attend_by_kernel(self.model)
        self.end_id = self.tokenizer("\n", add_special_tokens=False).input_ids[0]

    @staticmethod
    def load(path: str) -> tuple[Any, dict[str, Any]]:
        """Load :class:`CachedOPT`."""
        return CachedOPT.from_pretrained(path, torch_dtype="auto", **REPORTING)

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

    def generate(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """See :class:`LanguageModel`.

        As in LAVIS, a text's own prompt, including ``</s>``, counts in ``min_length``, ``length_penalty`` and
        ``repetition_penalty``, but not in ``min_new_tokens`` and ``max_new_tokens``. Padding would count too, so only
        prompts of equal length are batched together.
        """
        lengths = [len(ids) for ids in self.tokenizer(list(prompts)).input_ids]
        copies = options["num_return_sequences"]
        texts: dict[int, list[str]] = {}
        for length in sorted(set(lengths)):
            rows = [row for row, tokens in enumerate(lengths) if tokens == length]
            said = super().generate(visual[rows], [prompts[row] for row in rows], counted=length, **options)
            texts |= {row: said[i * copies : (i + 1) * copies] for i, row in enumerate(rows)}
        return [text for row in range(len(prompts)) for text in texts[row]]

    def answer(self, visual: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """See :class:`LanguageModel`; only the prompt's last token counts, as in LAVIS's main branch."""
        return super().generate(visual, prompts, do_sample=False, num_return_sequences=1, counted=1, **options)

    def continue_(self, visual: Tensor, prompts: Sequence[str], *, counted: int = 1, **options: Any) -> Tensor:
        """See :class:`LanguageModel`.

        transformers applies its lengths and penalties to the ids it is given: the last ``counted`` tokens of every
        prompt. Earlier tokens, including padding, are passed as embeddings together with the image.
        """
        self.tokenizer.padding_side = "left"  # prompts of different lengths must all end where the answer begins
        text = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(visual.device)
        self._check_length(visual.shape[1] + text.input_ids.shape[1] + options["max_new_tokens"])
        check_fewest(options, counted)
        before, begun = text.input_ids[:, :-counted], text.input_ids[:, -counted:]
        embeds, attention = self.embed(visual, before, text.attention_mask)
        copies = options["num_return_sequences"] if options["do_sample"] else options["num_beams"]
        ids = self.model.generate(
            input_ids=begun,
            query_embeds=embeds.repeat_interleave(copies, dim=0),
            attention_mask=attention,
            eos_token_id=self.end_id,
            **options,
        )
        return ids[:, counted:]

    def _check_length(self, tokens: int) -> None:
        limit = self.model.config.max_position_embeddings
        if tokens > limit:
            raise UserError(f"image, prompt and text take {tokens} tokens, but model.opt_model reads at most {limit}")
