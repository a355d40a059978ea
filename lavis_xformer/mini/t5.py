"""Mini T5: an encoder-decoder that knows the scenes' language and has never seen an image, built as FlanT5 is.

The encoder reads a description and a question, the decoder gives the answer; of a caption, the encoder reads a random
beginning and the decoder gives the rest, as in BLIP-2's training with T5.

B: batch, S: source tokens, T: target tokens, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

from lavis_xformer.losses import NO_TARGET, token_losses
from lavis_xformer.mini.language import Document, percent_by_kind
from lavis_xformer.mini.training import StepLoss, autocast


def t5_config(vocabulary: int) -> T5Config:
    """The mini T5: width 128, 4 encoder and 2 decoder layers, 4 heads, gated GELU, untied output layer, no dropout."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=1,
    )
    config.dense_act_fn = "gelu"  # exact, as LAVIS sets it for FlanT5
    return config


def pair(document: Document, rng: torch.Generator) -> tuple[str, str]:
    """Draw a source and a target from a document: a question about its text, or the two parts of a caption."""
    if document.questions:
        question = document.questions[int(torch.randint(len(document.questions), (), generator=rng))]
        return f"{document.text} Question: {question.text} Answer:".strip(), question.answer
    words = document.text.split()
    cut = int(torch.randint(len(words), (), generator=rng))
    return " ".join(words[:cut]), " ".join(words[cut:])


def encode(pairs: Sequence[tuple[str, str]], tokenizer: T5TokenizerFast) -> tuple[Tensor, Tensor, Tensor]:
    """Tokenise: source ids (B, S), their mask (B, S), target ids (B, T) with :data:`NO_TARGET` as padding."""
    sources, targets = zip(*pairs, strict=True)
    read = tokenizer(list(sources), padding=True, return_tensors="pt")
    said = tokenizer(list(targets), padding=True, return_tensors="pt")
    return read.input_ids, read.attention_mask, said.input_ids.masked_fill(said.attention_mask == 0, NO_TARGET)


def token_loss(model: T5ForConditionalGeneration, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target token, 0 on padding, and whether it is the most likely one, both (B, T)."""
    ids, mask, labels = (part.to(model.device) for part in batch)
    logits = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).logits  # (B, T, V)
    return token_losses(logits, labels), (logits.argmax(-1) == labels) | (labels == NO_TARGET)


def t5_loss(
    model: T5ForConditionalGeneration, documents: Sequence[Document], tokenizer: T5TokenizerFast, *, batch: int
) -> StepLoss:
    """One step: mean cross-entropy of the targets of ``batch`` documents, one pair from each."""

    def step(rng: torch.Generator, _progress: float) -> Tensor:
        """Loss of random documents."""
        rows = torch.randint(len(documents), (batch,), generator=rng).tolist()
        drawn = encode([pair(documents[row], rng) for row in rows], tokenizer)
        loss, _ = token_loss(model, drawn)
        return loss.sum() / (drawn[2] != NO_TARGET).sum()

    return step


@torch.no_grad()
def examine(
    model: T5ForConditionalGeneration, tokenizer: T5TokenizerFast, documents: Sequence[Document]
) -> dict[str, float]:
    """Percentage of answers of each kind that greedy decoding gets completely right.

    Every document has one turn, and one forward pass is enough, as in :func:`.language.accuracy`.

    Returns:
        ``{kind: percent}`` and ``mean`` over kinds.
    """
    solved: list[bool] = []
    rng = torch.Generator()
    for start in range(0, len(documents), 100):
        part = documents[start : start + 100]
        with autocast(model.device):
            _, hits = token_loss(model, encode([pair(document, rng) for document in part], tokenizer))
        solved += hits.all(dim=1).tolist()
    return percent_by_kind(documents, solved)
