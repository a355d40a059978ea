"""The pictures of a comparison: accuracies with intervals, accuracy by true count, learning curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from lavis_xformer.compare.plan import Cell, Plan
from lavis_xformer.run_folder import read_log, series

Json = dict[str, Any]
Series = tuple[Sequence[float], Sequence[float]]  # steps and values

CHANCE = {"loss_itm": 0.6365}  # the entropy of one matching pair among three
BARS = 5  # groups of bars per row
STRETCHES = 40  # points of a training curve
TERMS = ("loss_itc", "loss_itm", "loss_itg", "loss_rec", "loss_lm")  # not the total, which sums up different terms


def draw(plan: Plan, found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every figure that has data; return the paths of the PNGs."""
    variants = {name: of for name, of in found["variants"].items() if of["answers"]}
    pictures = []
    if variants:
        pictures.append(draw_bars(variants, found["tasks"], folder / "bars.png"))
    if any(of["by_count"] for of in variants.values()):
        pictures.append(draw_counts(variants, folder / "counts.png"))
    if curves := learning(plan):
        pictures.append(draw_curves(curves, folder / "curves.png"))
    return pictures


def draw_bars(variants: Mapping[str, Json], tasks: Mapping[str, Json], path: Path) -> Path:
    """Draw the accuracy on every group of questions with its 95 % interval, and the majority or chance baseline."""
    names, stages = list(tasks), {name.partition(".")[0] for name in tasks}
    rows = [names[start : start + BARS] for start in range(0, len(names), BARS)]
    panels, save = _axes(path, panels=len(rows), columns=1)
    width = 0.8 / len(variants)
    for axes, groups in zip(panels, rows, strict=True):
        for number, (name, of) in enumerate(variants.items()):
            held = [(place, of["accuracy"][group]) for place, group in enumerate(groups) if group in of["accuracy"]]
            places, values = [place + number * width for place, _ in held], [value for _, value in held]
            means, reach = [value["mean"] for value in values], _reach(values)
            axes.bar(places, means, width, yerr=reach, label=name, color=_colour(number), error_kw={"lw": 0.8})
        left = [place - width / 2 for place in range(len(groups))]
        levels = [tasks[group]["majority"] for group in groups]
        right = [start + 0.8 for start in left]
        axes.hlines(levels, left, right, color="black", lw=1.5, ls=(0, (2, 1)), label="most frequent answer, or chance")
        titles = [group.partition(".")[2] if len(stages) == 1 else group.replace(".", "\n", 1) for group in groups]
        ticks = [f"{title}\nn = {tasks[group]['n']}" for title, group in zip(titles, groups, strict=True)]
        axes.set_xticks([start + 0.4 for start in left], ticks, fontsize=8)
        axes.set_xlim(-0.3, min(BARS, len(names)))
        axes.set_ylabel("accuracy, % (95 % interval)", fontsize=8)
    return save()


def _reach(values: Sequence[Json]) -> list[list[float]]:
    """How far the intervals reach below and above their means."""
    return [[max(0.0, v["mean"] - v["low"]) for v in values], [max(0.0, v["high"] - v["mean"]) for v in values]]


def draw_counts(variants: Mapping[str, Json], path: Path) -> Path:
    """Draw every stage's counting accuracy by true count, with the number of questions for each."""
    stages = list(dict.fromkeys(stage for of in variants.values() for stage in of["by_count"]))
    panels, save = _axes(path, panels=len(stages), columns=1)
    for axes, stage in zip(panels, stages, strict=True):
        asked: dict[int, int] = {}
        for number, (name, of) in enumerate(variants.items()):
            curve = {int(count): value for count, value in of["by_count"].get(stage, {}).items()}
            asked |= {count: value["n"] for count, value in curve.items()}
            aside = 0.05 * (number - len(variants) / 2)  # so that intervals don't hide each other
            places, heights = [count + aside for count in curve], [value["mean"] for value in curve.values()]
            style = {"fmt": "o-", "ms": 3, "lw": 1.2, "elinewidth": 0.6, "color": _colour(number)}
            axes.errorbar(places, heights, _reach(list(curve.values())), label=name, **style)
        axes.set_xticks(sorted(asked), [f"{count}\nn = {asked[count]}" for count in sorted(asked)], fontsize=8)
        axes.set_xlabel("true count" if len(stages) == 1 else f"{stage}: true count")
        axes.set_ylabel("accuracy, % (95 % interval)")
        axes.set_ylim(bottom=0)
    return save()


class Curve(NamedTuple):
    """A loss of one run against steps."""

    training: Series  #: means over equal stretches of steps
    validation: Series


def learning(plan: Plan) -> dict[tuple[str, str], dict[str, list[Curve]]]:
    """Return the losses of every finished training: (stage, term) -> variant -> the curve of each seed."""
    found: dict[tuple[str, str], dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    unique: dict[Path, Cell] = {}
    for cell in plan.cells():
        unique.setdefault(cell.folder, cell)  # a shared run belongs to the first variant with it
    for cell in unique.values():
        if cell.finished and not cell.stage.evaluate:
            for term, curve in losses(cell.folder).items():
                found[(cell.stage.name, term)][cell.variant].append(curve)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], TERMS.index(item[0][1]))))


def losses(folder: Path) -> dict[str, Curve]:
    """Return every loss of a run's training and validations, from its log."""
    records = read_log(folder)
    steps, evals = ([record for record in records if record["kind"] == kind] for kind in ("step", "eval"))
    curves = {term: Curve(_thinned(*series(steps, term)), series(evals, term)) for term in TERMS}
    return {term: curve for term, curve in curves.items() if curve.training[0] or curve.validation[0]}


def _thinned(steps: Sequence[float], values: Sequence[float]) -> Series:
    """Means of steps and of values over up to :data:`STRETCHES` equal stretches."""
    size = -(-len(steps) // STRETCHES) or 1
    stretches = [slice(start, start + size) for start in range(0, len(steps), size)]
    return [fmean(steps[stretch]) for stretch in stretches], [fmean(values[stretch]) for stretch in stretches]


def draw_curves(curves: Mapping[tuple[str, str], Mapping[str, Sequence[Curve]]], path: Path) -> Path:
    """Draw every loss against steps: one colour per variant, one line per seed, validations as dots."""
    panels, save = _axes(path, panels=len(curves))
    colours = {name: _colour(i) for i, name in enumerate(dict.fromkeys(n for of in curves.values() for n in of))}
    for axes, ((stage, term), variants) in zip(panels, curves.items(), strict=True):
        for name, runs in variants.items():
            for number, curve in enumerate(runs):
                label = name if number == 0 else None  # a legend entry for each variant, not for each run
                axes.plot([], [], "o-", ms=3, lw=1, color=colours[name], label=label)
                axes.plot(*curve.training, lw=1, alpha=0.8, color=colours[name])
                axes.plot(*curve.validation, "o", ms=4, color=colours[name])
        if term in CHANCE:
            axes.axhline(CHANCE[term], color="black", lw=1, ls=(0, (2, 1)), label="chance")
        axes.set_title(f"{stage}: {term} (dots: validation)", fontsize=9)
        axes.set_xlabel("step")
    return save()


def _colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](2 * number % 20 + (number // 10) % 2)  # ten dark ones, then the same ten pale


def _axes(path: Path, *, panels: int = 1, columns: int = 4) -> tuple[list[Any], Callable[[], Path]]:
    """Axes of a new figure, up to ``columns`` side by side, and a function that saves it."""
    from matplotlib.figure import Figure

    columns = min(panels, columns)
    rows = -(-panels // columns)
    size = (9.0 if columns == 1 else 3.4 * columns, 4.5 if panels == 1 else 3.0 * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for each in axes:
        each.grid(alpha=0.25)
        each.set_axisbelow(True)

    def _save() -> Path:
        entries: dict[str, Any] = {}
        for each in axes:
            handles, labels = each.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        for ncols in range(6, 0, -1):  # as many columns as fit
            above = figure.legend(entries.values(), entries.keys(), fontsize=8, ncols=ncols, loc="outside upper center")
            if ncols == 1 or above.get_window_extent().width <= figure.bbox.width:
                break
            above.remove()
        figure.savefig(path, dpi=120)
        return path

    return axes, _save
