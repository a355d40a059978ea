"""The figure of the probe: accuracy by task and source, and similarity under low-pass and high-pass filtering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import color_sequences
from matplotlib.figure import Figure


def draw(
    path: Path,
    results: dict[str, dict[str, tuple[float, float]]],
    curves: dict[str, dict[str, list[float]]],
) -> None:
    """Write the figure.

    Args:
        path: output file.
        results: source to task to accuracy in percent and half the width of its interval, infinite if there is none.
        curves: as returned by :func:`lavis_xformer.probe.spectrum.similarity_curves`.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    tasks = list(next(iter(results.values())))
    places = np.arange(len(tasks))
    width = 0.8 / len(results)
    for number, (name, by_task) in enumerate(results.items()):
        means, halves = zip(*(by_task[task] for task in tasks), strict=True)
        known = [half if np.isfinite(half) else 0 for half in halves]
        left.bar(places + (number - (len(results) - 1) / 2) * width, means, width, yerr=known, label=name)
    left.set(xticks=places, xticklabels=tasks, ylabel="accuracy, %", ylim=(0, 100))
    left.set_title("Probe on frozen tokens, 95 % intervals over its seeds")
    left.legend(fontsize=8, ncols=3)
    cycles = curves["cutoffs"]["cycles"]
    for name, colour in zip((name for name in curves if name != "cutoffs"), color_sequences["tab10"], strict=False):
        right.plot(cycles, curves[name]["low"], "o-", color=colour, label=f"{name}, low-passed")
        right.plot(cycles, curves[name]["high"], "s--", color=colour, label=f"{name}, high-passed")
    right.set(xlabel="cut-off, cycles per side", ylabel="cosine to tokens of the whole image", title="Frequencies")
    if len(curves) > 1:
        right.legend(fontsize=8)
    else:
        right.remove()  # only of C, M and an untrained CLIP
    figure.savefig(path, dpi=110)
