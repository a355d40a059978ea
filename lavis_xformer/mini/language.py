"""Mini OPT: a causal language model that knows the scenes' language and has never seen an image.

It reads captions, and descriptions followed by questions and answers, so that in stage 2 an answer is wrong because
the image was not understood, not because the sentence was not.

B: batch, T: tokens, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

from lavis_xformer.mini.training import StepLoss, autocast


@dataclass(frozen=True)
class Turn:
    """One question of a kind, with its answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Document:
    """What the model reads: text, then questions with answers about it; either may be empty."""

    text: str
    turns: tuple[Turn, ...] = ()

    def parts(self) -> list[tuple[str, bool]]:
        """The document in order, each part with whether it is an answer; parts join without loss."""
        if not self.turns:
            return [(self.text, False), ("\n", True)]
        parts, lead = [(self.text, False)] if self.text else [], " " if self.text else ""
        for turn in self.turns:
            parts.append((f"{lead}Question: {turn.question} Answer:", False))
            parts.append((f" {turn.answer}\n", True))
            lead = ""
        return parts


def opt_config(vocabulary: int) -> OPTConfig:
    """The mini OPT: width 128, 4 layers, 4 heads, no dropout; token ids as OPT's own checkpoints."""
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=512,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )


def encode(documents: Sequence[Document], tokenizer: GPT2Tokenizer, *, length: int = 512) -> tuple[Tensor, Tensor]:
    """Tokenise documents, ``</s>`` first.

    Returns:
        Token ids (N, T) int16, ``<pad>`` on the right, and whether each token belongs to an answer (N, T); one
        longer than ``length`` is cut.
    """
    pieces: dict[str, list[int]] = {}

    def ids(text: str) -> list[int]:
        if text not in pieces:
            pieces[text] = tokenizer(text, add_special_tokens=False).input_ids
        return pieces[text]

    rows, marks = [], []
    for document in documents:
        row, mark = [tokenizer.bos_token_id], [False]
        for text, answer in document.parts():
            words = ids(text)
            row += words
            mark += [answer] * len(words)
        rows.append(torch.tensor(row[:length], dtype=torch.int16))
        marks.append(torch.tensor(mark[:length]))
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return tokens, pad(marks, batch_first=True)


def next_token_loss(model: OPTForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token and whether it is the most likely one.

    Args:
        model: causal language model.
        tokens: (B, T) long, right-padded.

    Returns:
        Loss (B, T - 1), zero on padding, and correctness (B, T - 1).
    """
    pad = model.config.pad_token_id
    logits = model(input_ids=tokens, attention_mask=(tokens != pad).long()).logits[:, :-1]
    target = tokens[:, 1:]
    loss = F.cross_entropy(logits.float().transpose(1, 2), target, ignore_index=pad, reduction="none")
    return loss, logits.argmax(-1) == target


def language_loss(model: OPTForCausalLM, tokens: Tensor, answers: Tensor, *, batch: int) -> StepLoss:
    """One step: mean cross-entropy of the answers plus a quarter of that of all tokens.

    What a scene holds can't be foreseen, so most of the second term is noise that would drown the first.

    Args:
        model: what to train.
        tokens: (N, T) int16 from :func:`encode`.
        answers: (N, T) from :func:`encode`.
        batch: documents per step, drawn among similar lengths.
    """
    device = next(model.parameters()).device
    lengths = (tokens != model.config.pad_token_id).sum(1)
    order = lengths.argsort(stable=True)
    bucket = min(len(order), 16 * batch)

    def step(rng: torch.Generator) -> Tensor:
        start = int(torch.randint(len(order) - bucket + 1, (), generator=rng))
        rows = order[start + torch.randint(bucket, (batch,), generator=rng)]
        width = int(lengths[rows].max())
        ids = tokens[rows, :width].long().to(device)
        wanted = answers[rows, 1:width].to(device)
        loss, _ = next_token_loss(model, ids)
        real = ids[:, 1:] != model.config.pad_token_id
        return 0.25 * loss.sum() / real.sum() + (loss * wanted).sum() / wanted.sum().clamp(min=1)

    return step


@torch.no_grad()
def accuracy(model: OPTForCausalLM, tokenizer: GPT2Tokenizer, documents: Sequence[Document]) -> dict[str, float]:
    """Share of answers, in percent by kind, that greedy decoding gets right to the last token.

    Every document has one turn. Greedy decoding gives the answer exactly if each of its tokens is the most likely one
    after the right ones before it, so one forward pass tells.

    Returns:
        ``{kind: percent}`` and ``mean`` over kinds.
    """
    tokens, answers = encode(documents, tokenizer)
    device = next(model.parameters()).device
    right: dict[str, list[bool]] = {}
    for rows in torch.arange(len(tokens)).split(100):
        with autocast(device):
            _, hits = next_token_loss(model, tokens[rows].long().to(device))
        solved = (hits.cpu() | ~answers[rows, 1:]).all(1).tolist()
        for row, good in zip(rows.tolist(), solved, strict=True):
            right.setdefault(documents[row].turns[0].kind, []).append(good)
    shares = {kind: 100 * sum(hits) / len(hits) for kind, hits in sorted(right.items())}
    return shares | {"mean": sum(shares.values()) / len(shares)}


@torch.no_grad()
def perplexity(model: OPTForCausalLM, tokenizer: GPT2Tokenizer, documents: Sequence[Document]) -> float:
    """Perplexity per token over documents."""
    tokens, _ = encode(documents, tokenizer)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for rows in torch.arange(len(tokens)).split(100):
        ids = tokens[rows].long().to(device)
        with autocast(device):
            loss, _ = next_token_loss(model, ids)
        total += loss.sum().item()
        count += int((ids[:, 1:] != model.config.pad_token_id).sum())
    return float(torch.tensor(total / count).exp())
