"""The figure of the probe: accuracy by task and source, and similarity under low-pass and high-pass."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt


def draw(path: Path, results: dict[str, dict[str, list[float]]], curves: dict[str, dict[str, list[float]]]) -> None:
    """Write the figure.

    Args:
        path: where to.
        results: source to task to percent right, one per probe seed.
        curves: as :func:`lavis_xformer.mini.spectrum.similarity_curves` gives them.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(2, 1), layout="constrained")
    tasks = list(next(iter(results.values())))
    places = np.arange(len(tasks))
    width = 0.8 / len(results)
    for number, (name, by_task) in enumerate(results.items()):
        means = [np.mean(by_task[task]) for task in tasks]
        spread = [np.std(by_task[task]) for task in tasks]
        left.bar(places + (number - (len(results) - 1) / 2) * width, means, width, yerr=spread, label=name)
    left.set(xticks=places, xticklabels=tasks, ylabel="right, %", title="Probe on frozen tokens")
    left.legend(fontsize=8, ncols=3)
    cycles = curves["cutoffs"]["cycles"]
    for name, colour in zip((name for name in curves if name != "cutoffs"), ("tab:blue", "tab:orange"), strict=True):
        right.plot(cycles, curves[name]["low"], "o-", color=colour, label=f"{name}, low-passed")
        right.plot(cycles, curves[name]["high"], "s--", color=colour, label=f"{name}, high-passed")
    right.set(xlabel="cut-off, cycles per side", ylabel="cosine to tokens of the whole image", title="Frequencies")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
