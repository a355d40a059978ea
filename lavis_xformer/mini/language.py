"""Mini OPT: a causal language model that knows the scenes' language and has never seen an image.

It is trained on captions, and on descriptions followed by questions and answers, so that a wrong answer in stage 2
means that the image was not understood, not the sentence. Then it learns to read notes, each embedded as one token:
a large language model accepts such a prefix out of the box, a small one that has only seen words does not.

B: batch, T: tokens, S: places (positions; the tokens of a note share one), D: width, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Tokenizer, OPTConfig

from lavis_xformer.data.scenes import Question
from lavis_xformer.mini.training import StepLoss, autocast
from lavis_xformer.models.opt import CachedOPT


@dataclass(frozen=True)
class Document:
    """What the model reads: notes, a text, then questions about it with answers; any may be empty."""

    text: str
    questions: tuple[Question, ...] = ()
    notes: tuple[str, ...] = ()

    def parts(self) -> list[tuple[str, bool]]:
        """The document's parts in order, each with whether it is to be learned: an answer or a whole caption is."""
        if not self.questions:
            return [(f"{self.text}\n", True)]
        parts, lead = [(self.text, False)] if self.text else [], " " if self.text else ""
        for question in self.questions:
            parts.append((f"{lead}Question: {question.text} Answer:", False))
            parts.append((f" {question.answer}\n", True))
            lead = ""
        return parts


def opt_config(vocabulary: int) -> OPTConfig:
    """The mini OPT: width 128, 6 layers, 4 heads, no dropout; token ids as in OPT's own checkpoints."""
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
def prepare(model: CachedOPT) -> None:
    """Initialise the model, in place, so that it quickly learns to look things up.

    Position embeddings start as sinusoids (Vaswani et al. 2017), so that distances are visible from the first step.
    Key weights start equal to query weights, output weights as the transposed value weights ("Mimetic Initialization of
    Self-Attention Layers", Trockman and Kolter 2023), so that every head first attends to equal and nearby words and
    copies them.
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


class Encoded(NamedTuple):
    """Documents as tokens (N, T), padded on the right."""

    tokens: Tensor  #: int16
    answers: Tensor  #: whether each token belongs to an answer
    places: Tensor  #: int16, the place where each token is read; the tokens of a note share one

    def take(self, rows: Tensor, device: torch.device) -> Encoded:
        """The documents in ``rows``, trimmed to the longest of them, on a device."""
        width = int((self.places[rows] < self.tokens.shape[1]).sum(1).max())
        return Encoded(*(part[rows, :width].to(device) for part in self))


def encode(documents: Sequence[Document], tokenizer: GPT2Tokenizer, *, length: int = 512) -> Encoded:
    """Tokenise documents: notes, then ``</s>``, text and questions; more than ``length`` places are truncated."""
    ids = cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    rows, marks, places = [], [], []
    for document in documents:
        row: list[int] = []
        place: list[int] = []
        for number, note in enumerate(document.notes):
            row += ids(f" {note}")
            place += [number] * len(ids(f" {note}"))
        read, limit = len(row), len(row) + length - len(document.notes)
        row, mark = [*row, tokenizer.bos_token_id], [False] * (read + 1)
        for text, answer in document.parts():
            row += ids(text)
            mark += [answer] * len(ids(text))
        place += range(len(document.notes), len(document.notes) + len(row) - read)
        rows.append(torch.tensor(row[:limit], dtype=torch.int16))
        marks.append(torch.tensor(mark[:limit]))
        places.append(torch.tensor(place[:limit], dtype=torch.int16))
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return Encoded(tokens, pad(marks, batch_first=True), pad(places, batch_first=True, padding_value=tokens.shape[1]))


def next_token_loss(
    model: CachedOPT, text: Encoded, *, noise: float = 0.0, rng: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each next token and whether it is the most likely one.

    A note is read as the sum of its tokens' embeddings divided by the square root of their number, which keeps the
    scale.

    Args:
        model: causal language model.
        text: as returned by :meth:`Encoded.take`.
        noise: standard deviation of the noise on notes, relative to their root mean square.
        rng: source of the noise.

    Returns:
        Loss (B, S - 1), zero on padding and notes; correctness and whether it belongs to an answer, (B, S - 1) each.
    """
    pad = model.config.pad_token_id
    tokens, real = text.tokens.long(), text.tokens != pad  # (B, T)
    places = text.places.long().masked_fill(~real, int(text.places[real].max()))  # padding adds nothing anywhere
    size = (len(tokens), int(places.max()) + 1)

    def spread(values: Tensor) -> Tensor:
        """Sum of the values (B, T) of all tokens at a place, (B, S)."""
        return values.new_zeros(size).scatter_add_(1, places, values * real)

    number, words = spread(real.long()), model.get_input_embeddings()(tokens) * real[..., None]  # (B, S), (B, T, D)
    index = places[..., None].expand_as(words)
    read = words.new_zeros(*size, words.shape[-1]).scatter_add_(1, index, words)  # (B, S, D)
    read = read / number.clamp(min=1).sqrt()[..., None]
    if noise:
        drawn = torch.randn(read.shape, generator=rng).to(read) * read.detach().square().mean(-1, keepdim=True).sqrt()
        read = read + noise * drawn * (number > 1)[..., None]
    logits = model(inputs_embeds=read, attention_mask=(number > 0).long()).logits[:, :-1]
    target = spread(tokens).masked_fill(number != 1, pad)[:, 1:]
    loss = F.cross_entropy(logits.float().transpose(1, 2), target, ignore_index=pad, reduction="none")
    return loss, logits.argmax(-1) == target, spread(text.answers.long())[:, 1:] == 1


def language_loss(model: CachedOPT, texts: Encoded, *, batch: int, noise: float = 0.0, first: float = 0.3) -> StepLoss:
    """One step: mean cross-entropy in which a token to be learned weighs 21 times as much as any other.

    The contents of a scene and the questions can't be predicted, so their loss is noise that would drown out the
    answers. Training starts with the shortest documents.

    Args:
        model: the model to train.
        texts: from :func:`encode`.
        batch: documents per step at mean length; more if they are shorter. Each step draws documents of similar length.
        noise: on the notes, see :func:`next_token_loss`.
        first: share of the documents, the shortest, that the first steps draw from; it grows during training.
    """
    device = next(model.parameters()).device
    lengths = (texts.tokens != model.config.pad_token_id).sum(1)
    order = lengths.argsort(stable=True)
    bucket = min(len(order), 300)
    budget = batch * float(lengths.float().mean())

    def step(rng: torch.Generator, progress: float) -> Tensor:
        """Loss of documents of similar length."""
        known = max(bucket, round(len(order) * min(1.0, first + 1.4 * progress)))
        start = int(torch.randint(known - bucket + 1, (), generator=rng))
        number = max(4, int(budget / int(lengths[order[start + bucket - 1]])))
        rows = order[start + torch.randint(bucket, (number,), generator=rng)]
        loss, _, wanted = next_token_loss(model, texts.take(rows, device), noise=noise, rng=rng)
        weight = wanted + 0.05 * (loss > 0)
        return (loss * weight).sum() / weight.sum()

    return step


@torch.no_grad()
def accuracy(model: CachedOPT, tokenizer: GPT2Tokenizer, documents: Sequence[Document]) -> dict[str, float]:
    """Percentage of answers of each kind that greedy decoding gets completely right.

    Every document has one question. Greedy decoding gives the answer exactly if each of its tokens is the most likely
    one given the correct tokens before it, so one forward pass is enough.

    Returns:
        ``{kind: percent}`` and ``mean`` over kinds.
    """
    texts = encode(documents, tokenizer)
    device = next(model.parameters()).device
    solved: list[bool] = []
    for rows in torch.arange(len(documents)).split(100):
        with autocast(device):
            _, hits, wanted = next_token_loss(model, texts.take(rows, device))
        solved += (hits | ~wanted).all(1).tolist()
    return percent_by_kind(documents, solved)


def percent_by_kind(documents: Sequence[Document], solved: Sequence[bool]) -> dict[str, float]:
    """Percentage of solved documents, each of one question: ``{kind: percent}``, and ``mean`` over kinds."""
    right: dict[str, list[bool]] = {}
    for document, good in zip(documents, solved, strict=True):
        right.setdefault(document.questions[0].kind, []).append(good)
    shares = {kind: 100 * sum(hits) / len(hits) for kind, hits in sorted(right.items())}
    return shares | {"mean": sum(shares.values()) / len(shares)}


@torch.no_grad()
def perplexity(model: CachedOPT, tokenizer: GPT2Tokenizer, documents: Sequence[Document]) -> float:
    """Perplexity per token over documents."""
    texts = encode(documents, tokenizer)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for rows in torch.arange(len(documents)).split(100):
        with autocast(device):
            loss, _, _ = next_token_loss(model, texts.take(rows, device))
        total += loss.sum().item()
        count += int((loss > 0).sum())
    return float(torch.tensor(total / count).exp())
