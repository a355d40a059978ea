"""``lavis-xformer report RUN_DIR``: a run's curves, configuration and figures on one HTML page."""

from __future__ import annotations

import argparse
import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_xformer.errors import UserError

Record = dict[str, Any]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
img { max-width: 100% } table { border-collapse: collapse; margin: 1em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: left }
td + td { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f5f5; padding: 1em; overflow: auto }
"""


def read_log(folder: Path) -> list[Record]:
    """Read the records of a run's ``log.jsonl``; a line torn by a kill is left out.

    Raises:
        UserError: the folder holds no log, or an empty one.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no log.jsonl")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    if not any(record["kind"] == "step" for record in records):
        raise UserError(f"{path} holds no training step yet")
    return records


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``curves.png`` into a run folder; return both paths.

    Raises:
        UserError: the folder holds no log of a training.
    """
    records = read_log(folder)
    picture, page = folder / "curves.png", folder / "report.html"
    draw_curves(records, picture)
    page.write_text(render(folder, records, picture.read_bytes()), encoding="utf-8")
    return page, picture


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Draw every loss term, the learning rate, speed and retrieval against steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    panels = _panels(steps, evals)
    rows = (len(panels) + 2) // 3
    figure = Figure(figsize=(12, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 3, number)
        for name in names:
            x, y = _series(steps, name)
            axes.plot(x, y, lw=0.5, alpha=0.35, color="C0")
            axes.plot(x, smooth(y), lw=1.4, color="C0", label="train" if y else None)
            for colour, split in enumerate(sorted({r["split"] for r in evals}), start=1):
                x, y = _series([r for r in evals if r["split"] == split], name)
                label = name if len(names) > 1 else split
                style = f"C{colour + names.index(name)}"
                axes.plot(x, y, "o-", ms=3, lw=1.2, color=style, label=label if y else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(useOffset=False)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def smooth(values: Sequence[float], *, share: float = 0.05) -> list[float]:
    """Return running means over the last ``share`` of the whole length."""
    width = max(1, int(len(values) * share))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def render(folder: Path, records: Sequence[Record], picture: bytes) -> str:
    """Return the page: it needs no other file and no network."""
    summary = _read_json(folder / "summary.json")
    config = _read_json(folder / "config.json")
    last = [record for record in records if record["kind"] == "step"][-1]
    state = "finished" if summary.get("finished") else "not finished"
    image = base64.b64encode(picture).decode()
    finals: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if record["kind"] in ("epoch", "eval", "test"):
            finals[f"{record['split']}, epoch {record['epoch']}"] = record
    shown = dict(list(finals.items())[-4:])
    parts = [
        f"<p>{state}: epoch {last['epoch']}, step {last['step']}</p>",
        f'<img alt="curves" src="data:image/png;base64,{image}">',
        "<h2>Figures</h2>",
        _table(shown),
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
    losses = [name for name in present if name.startswith("loss")]
    panels: list[tuple[str, list[str]]] = [(name, [name]) for name in losses]
    panels += [(name, [name]) for name in ("itm_accuracy", "lr", "grad_norm") if name in present]
    recalls: list[str] = [name for name in ("i2t_r1", "t2i_r1") if name in present]
    panels += [("retrieval R@1, %", recalls)] if recalls else []
    panels += [(name, [name]) for name in ("images_per_s", "data_wait") if name in present]
    return panels


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys(record)
    return list(names)


def _series(records: Iterable[Record], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the records in which ``name`` is a number."""
    pairs = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
    return [step for step, _ in pairs], [value for _, value in pairs]


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
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="lavis-xformer report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the folder of a run, with its log.jsonl")
    page, picture = write_report(parser.parse_args(argv).run_dir)
    print(f"{page}\n{picture}")
    return 0
