"""``lavis-xformer report RUN_DIR``: a run's curves, configuration and figures on one HTML page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lavis_xformer.arguments import command_parser
from lavis_xformer.errors import UserError
from lavis_xformer.files import read_json
from lavis_xformer.run_folder import CONFIG, LOG, SUMMARY, Record, read_log, series

TITLES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "images_per_s": "images per second",
    "data_wait": "share of the time spent waiting for data",
    "peak_memory_mb": "peak memory, MiB",
}
REFERENCES = {"loss_rec": ("rec_mae", "frozen MAE alone")}
CHANCE_ITM = 2 / 3  # two mismatched pairs for each matched one

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
img { max-width: 100% } table { border-collapse: collapse; margin: 1em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: left }
td + td { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f5f5; padding: 1em; overflow: auto }
"""


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``curves.png`` into a run folder; return both paths.

    Raises:
        UserError: the folder holds no log of a training.
    """
    records = read_log(folder)
    if not any(record["kind"] == "step" for record in records):
        raise UserError(f"{folder / LOG} has no training step yet")
    picture, page = folder / "curves.png", folder / "report.html"
    draw_curves(records, picture)
    page.write_text(render(folder, records, picture.read_bytes()), encoding="utf-8")
    return page, picture


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Draw every loss term, retrieval, the learning rate and the speed against steps, as a PNG."""
    from matplotlib.figure import Figure

    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    panels = _panels(steps, evals)
    rows = (len(panels) + 2) // 3
    figure = Figure(figsize=(12, 2.8 * rows), layout="constrained")
    for number, (title, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 3, number)
        for style, name in enumerate(names):
            _draw_training(axes, steps, name)
            _draw_evaluation(axes, evals, name, style=style, label=name if len(names) > 1 else "")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_xlim(0, 1.02 * steps[-1]["step"])
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(useOffset=False)
        axes.grid(alpha=0.25)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _draw_training(axes: Any, steps: Sequence[Record], name: str) -> None:
    """Draw each step thinly and a moving average; the learning rate needs no smoothing."""
    x, y = series(steps, name)
    if not y:
        return
    if name == "lr":
        axes.plot(x, y, lw=1.4, color="C0")
        return
    axes.plot(x, y, lw=0.5, alpha=0.35, color="C0")
    axes.plot(x, smooth(y), lw=1.4, color="C0", label="train")


def _draw_evaluation(axes: Any, evals: Sequence[Record], name: str, *, style: int, label: str) -> None:
    """Draw each split's values, and a dashed line for chance or for the frozen MAE alone."""
    splits = sorted({record["split"] for record in evals})
    for colour, split in enumerate(splits, start=1 + style * len(splits)):
        own = [record for record in evals if record["split"] == split]
        x, y = series(own, name)
        if not y:
            continue
        axes.plot(x, y, "o-", ms=3, lw=1.2, color=f"C{colour}", label=f"{label} {split}".strip())
        reference, meaning = REFERENCES.get(name, (f"chance_{name}", "chance"))
        _, y = series(own, reference)
        level = y[-1] if y else CHANCE_ITM if name == "itm_accuracy" else None
        if level is not None:
            named = meaning in axes.get_legend_handles_labels()[1]
            axes.axhline(level, ls="--", lw=1, color="0.4", label=None if named else meaning)


def smooth(values: Sequence[float], *, share: float = 0.05) -> list[float]:
    """Return a centred moving average over ``share`` of the whole length."""
    reach = max(0, int(len(values) * share / 2))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    edges = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def render(folder: Path, records: Sequence[Record], picture: bytes) -> str:
    """Return the page, which needs no other file and no network."""
    summary = _read_json(folder / SUMMARY)
    config = _read_json(folder / CONFIG)
    last = [record for record in records if record["kind"] == "step"][-1]
    state = "finished" if summary.get("finished") else "not finished"
    image = base64.b64encode(picture).decode()
    finals = {f"{r['split']}, epoch {r['epoch']}": r for r in records if r["kind"] in ("epoch", "eval", "test")}
    parts = [
        f"<p>{state}: epoch {last['epoch']}, step {last['step']}</p>",
        f'<img alt="curves" src="data:image/png;base64,{image}">',
        "<h2>Figures</h2>",
        _table(dict(list(finals.items())[-4:])),
        "<h2>Versions</h2>",
        _table({"version": summary.get("versions", {})}),
        "<h2>Configuration</h2>",
        f"<pre>{html.escape(json.dumps(config, indent=2))}</pre>",
    ]
    title = html.escape(folder.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>\n"
    )


def _panels(steps: Sequence[Record], evals: Sequence[Record]) -> list[tuple[str, list[str]]]:
    present = _names([*steps, *evals])
    panels: list[tuple[str, list[str]]] = [(name, [name]) for name in present if name.startswith("loss")]
    recalls: list[str] = [name for name in ("i2t_r1", "t2i_r1") if name in present]
    panels += [("ITM accuracy", ["itm_accuracy"])] if "itm_accuracy" in present else []
    panels += [("retrieval R@1, %", recalls)] if recalls else []
    speed = ("lr", "grad_norm", "images_per_s", "data_wait", "peak_memory_mb")
    return panels + [(TITLES[name], [name]) for name in speed if name in present]


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(records)))


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    names = [n for n in _names(columns.values()) if n not in ("kind", "split", "epoch", "step")]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_text(values.get(name, ''))}</td>" for values in columns.values())
        + "</tr>"
        for name in names
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = command_parser("report", __doc__)
    parser.add_argument("run_dir", type=Path, help="the folder of a run, with its log.jsonl")
    folder = parser.parse_args(argv).run_dir
    try:
        page, picture = write_report(folder)
    except OSError as error:
        raise UserError(f"{folder}: the report can't be written: {error}") from error
    print(f"{page}\n{picture}")
    return 0
