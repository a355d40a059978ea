"""The probe: one attention pooling per task, trained on frozen tokens with early stopping.

B: batch, P: patches + 1, D: width of the tokens, W: width of the probe, H: heads, T: tasks, A: queries per task.
"""

from __future__ import annotations

from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_xformer.mini.training import autocast, generator
from lavis_xformer.probe.exam import NONE, TASKS, Exam
from lavis_xformer.probe.tokens import Encoder, Standardise, extract

TRAIN, STOP = "probe-train", "probe-stop"
WIDTH, HEADS, QUERIES = 64, 4, 4  # W, H and A


class Probe(nn.Module):
    """One projection of the tokens; for each task, queries that attend to them and a small MLP that classifies.

    Every token comes with its row and column, so that a source is judged by what it shows, not by knowing where. They
    stand beside the token: learned embeddings that are added to it, as in ViT, were not found within the steps.
    """

    places: Tensor
    pointed: Tensor

    def __init__(self, *, dim: int, patches: int) -> None:
        """Build it for tokens (B, P, D): ``dim`` is D, ``patches`` P."""
        super().__init__()
        self.tokens = nn.Linear(dim, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("places", grid(patches))  # (P, 2 x side)
        self.both = nn.Linear(WIDTH + self.places.shape[-1], 2 * WIDTH)  # keys and values
        self.queries = nn.Parameter(torch.randn(len(TASKS), QUERIES, WIDTH) / WIDTH**0.5)
        self.focus = nn.Parameter(torch.linspace(-3, 1, HEADS))
        self.register_buffer("pointed", torch.tensor([float(task.pointed) for task in TASKS.values()]))
        self.answers = nn.ModuleDict()
        for name, task in TASKS.items():
            layers = nn.Linear(QUERIES * WIDTH + 2, WIDTH), nn.GELU(), nn.Linear(WIDTH, task.classes)
            self.answers[name] = nn.Sequential(*layers)

    def forward(self, tokens: Tensor, points: Tensor) -> dict[str, Tensor]:
        """Standardised tokens (B, P, D) and points (B, 2) to logits of every task."""
        x = torch.cat([self.norm(self.tokens(tokens)), self.places.expand(len(tokens), -1, -1)], -1)
        x = self.both(x).unflatten(-1, (2, HEADS, -1))
        keys, values = x.permute(2, 0, 3, 1, 4)  # each (B, H, P, W / H)
        queries = self.queries.flatten(0, 1).unflatten(-1, (HEADS, -1)).transpose(0, 1)  # (H, T x A, W / H)
        scores = queries @ keys.transpose(-2, -1) / keys.shape[-1] ** 0.5
        scores = scores.unflatten(2, self.queries.shape[:2]) - self.farness(points)  # (B, H, T, A, P)
        pooled = scores.softmax(-1).flatten(2, 3) @ values  # (B, H, T x A, W / H)
        pooled = pooled.unflatten(2, self.queries.shape[:2]).permute(2, 0, 3, 1, 4).flatten(2)  # (T, B, A x W)
        told = self.pointed[:, None, None] * points  # (T, B, 2)
        inputs = torch.cat([pooled, told], -1)
        return {name: layers(part) for (name, layers), part in zip(self.answers.items(), inputs, strict=True)}

    def farness(self, points: Tensor) -> Tensor:
        """Penalty on a pointed task's scores for distance from the point, (B, H, T, 1, P); learned per head."""
        side = round((len(self.places) - 1) ** 0.5)
        axis = (torch.arange(side) + 0.5) / side
        centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)  # (P - 1, 2)
        far = side**2 * (points[:, None] - centres).square().sum(-1)  # (B, P - 1), in patches squared
        far = F.pad(far, (1, 0))[:, None, None, None]  # CLS is never penalised
        return F.softplus(self.focus)[:, None, None, None] * self.pointed[:, None, None] * far


def grid(patches: int) -> Tensor:
    """Row and column of every token in a square of patches, one-hot (P, 2 x side); zeros for CLS."""
    side = round((patches - 1) ** 0.5)
    rows, columns = torch.eye(side).repeat_interleave(side, 0), torch.eye(side).repeat(side, 1)
    return F.pad(torch.cat([rows, columns], -1), (0, 0, 1, 0))


def labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the scenes that have a label, 0 if none has; logits (B, classes), labels (B,)."""
    total = F.cross_entropy(logits, labels, ignore_index=NONE, reduction="sum")
    return total / (labels != NONE).sum().clamp(min=1)


def correct(probe: Probe, tokens: Tensor, exam: Exam) -> dict[str, float]:
    """Accuracy of each task, in percent, over the scenes that allow it."""
    right = {name: 0 for name in TASKS}
    with torch.no_grad(), autocast(tokens.device):
        for rows in torch.arange(len(tokens)).split(500):
            for name, logits in probe(tokens[rows], exam.points[rows]).items():
                right[name] += int((logits.argmax(-1) == exam.labels[name][rows]).sum())
    return {name: 100 * hits / int((exam.labels[name] != NONE).sum()) for name, hits in right.items()}


def train_probe(
    encoder: Encoder, exams: dict[str, Exam], report: str, *, steps: int, seeds: int
) -> dict[str, list[float]]:
    """Train and evaluate the probe on one source of tokens.

    Args:
        encoder: the frozen source.
        exams: scenes for training (``TRAIN``), early stopping (``STOP``) and reporting.
        report: the key of those for reporting.
        steps: optimiser steps of 256 scenes.
        seeds: number of probes, each with its own initialisation.

    Returns:
        Task to accuracies in percent on the reported scenes, one per seed, at the first step that was best for the
        task on the early-stopping scenes.
    """
    tokens = {split: extract(encoder, exam.images) for split, exam in exams.items()}
    scale = Standardise(tokens[TRAIN])
    held = {split: scale(tokens[split]) for split in exams if split != TRAIN}
    results: dict[str, list[float]] = {name: [] for name in TASKS}
    for seed in range(seeds):
        torch.manual_seed(seed)
        probe = Probe(dim=tokens[TRAIN].shape[-1], patches=tokens[TRAIN].shape[1])
        best = {name: (-1.0, 0.0) for name in TASKS}
        optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.05)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 11), pct_start=0.1)
        for step in range(steps):
            rows = torch.randint(len(tokens[TRAIN]), (256,), generator=generator(seed, step))
            with autocast(tokens[TRAIN].device):
                logits = probe(scale(tokens[TRAIN][rows]), exams[TRAIN].points[rows])
                terms = [labelled(logits[name], exams[TRAIN].labels[name][rows]) for name in TASKS]
            optimizer.zero_grad()
            torch.stack(terms).sum().backward()
            optimizer.step()
            decay.step()
            if (step + 1) % max(1, steps // 8) == 0:
                stop, shown = (correct(probe, held[split], exams[split]) for split in (STOP, report))
                best = {name: max(best[name], (stop[name], shown[name]), key=itemgetter(0)) for name in TASKS}
        for name in TASKS:
            results[name].append(best[name][1])
    return results
