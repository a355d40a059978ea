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
        """The document in order, each part with whether it is to be learned: an answer, or a whole caption."""
        if not self.turns:
            return [(f"{self.text}\n", True)]
        parts, lead = [(self.text, False)] if self.text else [], " " if self.text else ""
        for turn in self.turns:
            parts.append((f"{lead}Question: {turn.question} Answer:", False))
            parts.append((f" {turn.answer}\n", True))
            lead = ""
        return parts


def opt_config(vocabulary: int) -> OPTConfig:
    """The mini OPT: width 128, 6 layers, 4 heads, no dropout; token ids as OPT's own checkpoints."""
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=512,
        dropout=0.0,
        init_std=0.06,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )


@torch.no_grad()
def prepare(model: OPTForCausalLM) -> None:
    """Start where looking things up is quickly learned, in place.

    Positions start as sinusoids (Vaswani et al. 2017), so that distance is seen from the first step. Keys start
    equal to queries and the output as the transposed values ("Mimetic Initialization of Self-Attention Layers",
    Trockman and Kolter 2023), so that every head begins by finding equal words and near ones, and copying them.
    """
    decoder, std = model.model.decoder, model.config.init_std
    table = decoder.embed_positions.weight  # (positions, D)
    count, width = table.shape
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * rates  # (positions, D / 2)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    table.copy_(std * 2**0.5 * waves)
    for layer in decoder.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.v_proj):
            linear.weight.normal_(std=width**-0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.out_proj.weight.copy_(attention.v_proj.weight.T)


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
    """One step: mean cross-entropy in which a token to be learned counts 21 times as much as any other.

    What a scene holds and what is asked can't be foreseen, so their loss is noise that would drown the answers.
    The shortest 30 % of the documents come first, all of them from half the training on.

    Args:
        model: what to train.
        tokens: (N, T) int16 from :func:`encode`.
        answers: (N, T) from :func:`encode`.
        batch: documents of mean length per step; more where they are shorter. They are drawn among similar lengths.
    """
    device = next(model.parameters()).device
    lengths = (tokens != model.config.pad_token_id).sum(1)
    order = lengths.argsort(stable=True)
    bucket = min(len(order), 300)
    budget = batch * float(lengths.float().mean())

    def step(rng: torch.Generator, progress: float) -> Tensor:
        known = max(bucket, round(len(order) * min(1.0, 0.3 + 1.4 * progress)))
        start = int(torch.randint(known - bucket + 1, (), generator=rng))
        number = max(4, int(budget / int(lengths[order[start + bucket - 1]])))
        rows = order[start + torch.randint(bucket, (number,), generator=rng)]
        width = int(lengths[rows].max())
        ids = tokens[rows, :width].long().to(device)
        wanted = answers[rows, 1:width].to(device)
        loss, _ = next_token_loss(model, ids)
        weight = wanted + 0.05 * (ids[:, 1:] != model.config.pad_token_id)
        return (loss * weight).sum() / weight.sum()

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
