"""``lavis-xformer probe``: what the same small probe can read from frozen C, M and their controls.

The paper's premise is that M carries local detail which C lacks. One attention pooling per task reads standardised
tokens; every source gets the same scenes, the same steps and the same early stopping, and the best step is chosen
on scenes that are used neither for training nor for reporting.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from scipy.stats import t as student
from tqdm import tqdm

from lavis_xformer import markdown
from lavis_xformer.arguments import at_least, command_parser
from lavis_xformer.assets import resolve
from lavis_xformer.errors import UserError, one_of
from lavis_xformer.files import make_folder, write_json, write_text
from lavis_xformer.probe.exam import NONE, TASKS, Exam, make_exam
from lavis_xformer.probe.figure import draw
from lavis_xformer.probe.pooling import STOP, TRAIN, train_probe
from lavis_xformer.probe.positions import position_r2
from lavis_xformer.probe.spectrum import similarity_curves
from lavis_xformer.probe.tokens import Encoder, encoders, extract


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); infinite for one value."""
    sample = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return float(sample.mean()), float("inf")
    half = student.ppf(0.975, len(values) - 1) * float(sample.std()) / len(values) ** 0.5
    return float(sample.mean()), float(half)


def cell(mean: float, half: float) -> str:
    """``39.3 ± 0.7``; without the interval if there is only one seed."""
    return f"{mean:.1f} ± {half:.1f}" if half < float("inf") else f"{mean:.1f}"


def table(results: dict[str, dict[str, list[float]]], chance: dict[str, float]) -> str:
    """Markdown: a row per source, then C+M minus C and C+M minus two layers of C, paired by seed."""
    rows = {name: {task: interval(values) for task, values in by.items()} for name, by in results.items()}
    for other in ("C", "C two layers"):
        if {"C+M", other} <= results.keys():
            both = results["C+M"], results[other]
            gaps = {k: [a - b for a, b in zip(both[0][k], both[1][k], strict=True)] for k in TASKS}
            rows[f"C+M minus {other}"] = {task: interval(values) for task, values in gaps.items()}
    guesses = ["most frequent answer", *(f"{chance[task]:.1f}" for task in TASKS)]
    read = [[name, *(cell(*cells[task]) for task in TASKS)] for name, cells in rows.items()]
    return markdown.table(["tokens", *TASKS], [guesses, *read])


def frequencies(curves: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: similarity of the filtered image's tokens to those of the whole image, by cut-off."""
    cutoffs = [f"{cycles:g}" for cycles in curves["cutoffs"]["cycles"]]
    rows = [
        [f"{name}, {kept}-passed", *(f"{value:.2f}" for value in by[kept])]
        for name, by in curves.items()
        if name != "cutoffs"
        for kept in ("low", "high")
    ]
    return markdown.table(["cosine, cut-off in cycles per side", *cutoffs], rows)


def said_of(placed: dict[str, float]) -> str:
    """A line about how well tokens encode their own position."""
    return "R² of a token's row and column, read from that token alone: " + ", ".join(
        f"{name} {r2:.2f}" for name, r2 in placed.items()
    )


def majority(exam: Exam) -> dict[str, float]:
    """Accuracy, in percent, of always giving the most frequent answer."""
    known = {name: labels[labels != NONE] for name, labels in exam.labels.items()}
    return {name: 100 * float(labels.bincount().max()) / len(labels) for name, labels in known.items()}


def chosen(models: str, names: str | None) -> dict[str, Encoder]:
    """Return a model set's sources of tokens: those in a comma-separated list, or all."""
    parts = [resolve(f"{models}/{part}") for part in ("clip", "mae")]
    for part in parts:
        if not (part / "config.json").is_file():
            made = "lavis-xformer build-mini --only clip --only mae --out FOLDER makes such a set"
            raise UserError(f"--set {models}: {part} does not exist; {made}")
    sources = encoders(parts[0].parent)
    wanted = [name.strip() for name in names.split(",")] if names else list(sources)
    return {name: sources[one_of("--sources", name, sources)] for name in wanted}


def drawn(split: str, count: int) -> Exam:
    """Return the exam of a split's first scenes; raise if none of them has an answer for some task."""
    exam = make_exam(split, seed=0, count=count)
    for name, labels in exam.labels.items():
        if not (labels != NONE).any():
            key = "scenes" if split == TRAIN else "held-out"
            raise UserError(f"--{key} {count}: none of these scenes has an answer for {name}; use more")
    return exam


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        UserError: the set of models or a source of tokens does not exist, or there are too few scenes.
    """
    parser = command_parser("probe", __doc__)
    parser.add_argument("--set", default="assets://mini", help="folder with clip and mae (default: the shipped one)")
    parser.add_argument("--out", type=Path, default=Path("output/probe"), help="folder to write (default: %(default)s)")
    parser.add_argument("--report", choices=("val", "test"), default="val", help="what to report on (default: val)")
    parser.add_argument("--sources", help="sources of tokens, comma-separated (default: all)")
    parser.add_argument("--scenes", type=at_least(1), default=8000, help="to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=at_least(1), default=2000, help="to stop by and report on (default: 2000)")
    parser.add_argument("--steps", type=at_least(1), default=800, help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="probes per source (default: %(default)s)")
    args = parser.parse_args(argv)
    make_folder(args.out, "--out")
    begin = time.monotonic()
    sources = chosen(args.set, args.sources)
    report = f"probe-{args.report}"
    counts = {TRAIN: args.scenes, STOP: args.held_out, report: args.held_out}
    print(f"rendering {sum(counts.values())} scenes", flush=True)
    exams = {split: drawn(split, count) for split, count in counts.items()}
    bar = tqdm(sources.items(), desc="sources of tokens probed")
    results = {name: train_probe(source, exams, report, steps=args.steps, seeds=args.seeds) for name, source in bar}
    print("measuring frequencies and positions", flush=True)
    shown = exams[report]
    told = {name: source for name, source in sources.items() if name in ("C", "M", "random")}
    curves = similarity_curves(told, shown.images[:500])
    placed = {name: position_r2(extract(source, shown.images[:500])) for name, source in sources.items()}
    chance = majority(shown)
    parts = [table(results, chance), *([frequencies(curves)] if told else []), said_of(placed)]
    text = "\n\n".join(parts)
    record = {"arguments": vars(args) | {"out": str(args.out)}, "accuracy": results, "majority": chance}
    record |= {"position_r2": placed, "similarity": curves}
    write_json(args.out / "probe.json", record)
    write_text(args.out / "probe.md", text + "\n")
    means = {name: {task: interval(values) for task, values in by.items()} for name, by in results.items()}
    draw(args.out / "probe.png", means, curves)
    print(f"{text}\n{args.out}: probe.md, probe.json, probe.png in {(time.monotonic() - begin) / 60:.1f} min")
    return 0
