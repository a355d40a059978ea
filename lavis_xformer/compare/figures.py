"""The pictures of a comparison: accuracies with intervals, accuracy by true count, learning curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_xformer.compare.plan import Plan
from lavis_xformer.compare.results import RESAMPLES, by_question
from lavis_xformer.scoring import paired_bootstrap

COUNTS = ("count", "count_group")


def draw(plan: Plan, found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to draw; return the PNGs."""
    questions = {name: by_question(of["answers"]) for name, of in found["variants"].items() if of["answers"]}
    curves: dict[str, list[Path]] = defaultdict(list)
    for cell in plan.cells():
        if cell.finished and not cell.stage.evaluate:
            curves[cell.variant].append(cell.folder / "log.jsonl")
    pictures = []
    if questions:
        pictures += [draw_bars(questions, folder / "bars.png"), draw_counts(questions, folder / "counts.png")]
    if any(curves.values()):
        pictures.append(draw_curves(curves, folder / "curves.png"))
    return pictures


def draw_bars(questions: Mapping[str, Mapping[Any, Any]], path: Path) -> Path:
    """Draw the accuracy of every kind of question with its 95 % interval, a bar for every variant."""
    axes, save = _axes(path, "accuracy, % (95 % interval)")
    groups = sorted({row["group"] for rows in questions.values() for row in rows.values()})
    width = 0.8 / len(questions)
    for number, (name, rows) in enumerate(questions.items()):
        bars = [interval([row for row in rows.values() if row["group"] == group]) for group in groups]
        means, below, above = (list(column) for column in zip(*bars, strict=True))
        places = [place + number * width for place in range(len(groups))]
        axes.bar(places, means, width, yerr=[below, above], label=name, error_kw={"lw": 0.8})
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], groups, rotation=20)
    return save()


def interval(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Return mean accuracy in percent, and how far its 95 % interval reaches below and above."""
    if not rows:
        return 0.0, 0.0, 0.0
    zeros, images = [0.0] * len(rows), [row["image"] for row in rows]
    found = paired_bootstrap([row["score"] for row in rows], zeros, clusters=images, resamples=RESAMPLES)
    mean = 100 * found.difference
    return mean, max(0.0, mean - 100 * found.low), max(0.0, 100 * found.high - mean)


def draw_counts(questions: Mapping[str, Mapping[Any, Any]], path: Path) -> Path:
    """Draw the accuracy of counting by the true count."""
    axes, save = _axes(path, "accuracy, %")
    for name, rows in questions.items():
        curve = accuracy_by_count(list(rows.values()))
        axes.plot(list(curve), [100 * value for value in curve.values()], "o-", ms=3, label=name)
    axes.set_xlabel("true count")
    return save()


def accuracy_by_count(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the share of right answers to counting questions by the true count."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["kind"] in COUNTS:
            scores[int(row["truth"])].append(row["score"])
    return {count: sum(given) / len(given) for count, given in sorted(scores.items())}


def draw_curves(logs: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """Draw the validation loss of every training against steps, a colour for every variant."""
    axes, save = _axes(path, "validation loss")
    for colour, (name, files) in enumerate(logs.items()):
        label = name
        for file in files:
            points = validation(file)
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", ms=3, lw=1, color=f"C{colour}", label=label)
            label = "_"  # a legend entry for each variant, not for each run
    axes.set_xlabel("step")
    return save()


def validation(file: Path) -> list[tuple[int, float]]:
    """Return steps and losses of a run's validations."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "eval" and "loss" in r]


def _axes(path: Path, title: str) -> tuple[Any, Any]:
    """Axes of a new figure, and what to call when they are drawn on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylabel(title)
    axes.grid(alpha=0.25)

    def save() -> Path:
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        return path

    return axes, save
