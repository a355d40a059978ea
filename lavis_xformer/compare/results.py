"""What came out of a comparison: means and spreads over seeds, and differences with their intervals.

Only files are read: ``cell.json`` and ``summary.json`` of finished cells, and the answers in ``result/*.json``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lavis_xformer.compare.plan import Cell, Plan
from lavis_xformer.scoring import paired_bootstrap

Json = dict[str, Any]

#: of a training's test figures, what the table shows
SHOWN = ("i2t_r1", "t2i_r1", "itm_accuracy", "loss_rec", "rec_mae", "caption_f1")
ASKED = ("accuracy", "majority", "mae")  # and of an evaluation's
RESAMPLES = 2000


def collect(plan: Plan) -> Json:
    """Return everything about the finished cells of a comparison, ready for JSON."""
    cells = [cell for cell in plan.cells() if cell.finished]
    variants = {name: of_variant([cell for cell in cells if cell.variant == name]) for name in plan.variants}
    base = variants[plan.baseline]
    return {
        "name": plan.name,
        "baseline": plan.baseline,
        "planned": len(plan.cells()),
        "finished": len(cells),
        "variants": variants,
        "differences": {
            name: differences(found["answers"], base["answers"])
            for name, found in variants.items()
            if name != plan.baseline
        },
        "plan": {"seeds": plan.seeds, "variants": plan.variants, "stages": [vars(stage) for stage in plan.stages]},
    }


def of_variant(cells: Sequence[Cell]) -> Json:
    """Return a variant's costs, figures (by seed, with mean and spread) and answers."""
    costs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    values: dict[str, dict[int, float]] = defaultdict(dict)
    answers: list[Json] = []
    for cell in cells:
        note = _json(cell.folder / "cell.json")
        for key in ("seconds", "peak_memory_mb", "trainable"):
            if note.get(key) is not None:
                costs[cell.stage.name][key].append(note[key])
        for name, value in _figures(cell):
            values[f"{cell.stage.name}.{name}"][cell.seed] = value
        for file in sorted((cell.folder / "result").glob("*.json")) if cell.stage.evaluate else ():
            answers += [{**answer, "seed": cell.seed, "stage": cell.stage.name} for answer in _json(file)["answers"]]
    return {
        "seeds": sorted({cell.seed for cell in cells}),
        "costs": {stage: {key: fmean(given) for key, given in cost.items()} for stage, cost in costs.items()},
        "figures": {name: {**mean_and_spread(given.values()), "seeds": given} for name, given in values.items()},
        "folders": [str(cell.folder) for cell in cells],
        "answers": answers,
    }


def _figures(cell: Cell) -> Iterable[tuple[str, float]]:
    """Figures of one run: a training's on its test splits, an evaluation's beside the majority's."""
    if cell.stage.evaluate:
        for file in sorted((cell.folder / "result").glob("*.json")):
            figures = _json(file)["figures"]
            yield from ((name, value) for name, value in figures.items() if name.startswith(ASKED))
        return
    for figures in _json(cell.folder / "summary.json")["test"].values():
        yield from ((name, value) for name, value in (figures or {}).items() if name in SHOWN)


def mean_and_spread(values: Iterable[float]) -> Json:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    given = list(values)
    return {"mean": fmean(given), "spread": stdev(given) if len(given) > 1 else None}


def differences(ours: Sequence[Json], theirs: Sequence[Json]) -> Json:
    """Return the difference of accuracy in percent points, over all questions and of every group.

    A question's score is its mean over seeds; questions of an image are drawn together. Only what both were asked
    counts.

    Args:
        ours: answers of one variant.
        theirs: of the baseline.
    """
    mine, other = by_question(ours), by_question(theirs)
    common = [key for key in mine if key in other]
    groups: dict[str, list[Any]] = defaultdict(list)
    for key in common:
        groups[mine[key]["group"]].append(key)
    parts = {"all": common, **dict(sorted(groups.items()))} if common else {}
    found = {}
    for name, keys in parts.items():
        gap = paired_bootstrap(
            [mine[key]["score"] for key in keys],
            [other[key]["score"] for key in keys],
            clusters=[mine[key]["image"] for key in keys],
            resamples=RESAMPLES,
        )
        found[name] = {"n": len(keys), "difference": 100 * gap.difference, "low": 100 * gap.low, "high": 100 * gap.high}
    return found


def by_question(answers: Sequence[Json]) -> dict[tuple[Any, ...], Json]:
    """Return every question once, with its mean ``score`` over the seeds."""
    scores: dict[tuple[Any, ...], list[bool]] = defaultdict(list)
    rows: dict[tuple[Any, ...], Json] = {}
    for answer in answers:
        key = (answer["stage"], answer["question_id"], answer["image"], answer["question"])
        scores[key].append(answer["correct"])
        rows[key] = answer
    return {key: {**rows[key], "score": fmean(scores[key])} for key in rows}


def markdown(found: Json) -> str:
    """Return the tables of a comparison."""
    variants = {name: given for name, given in found["variants"].items() if given["seeds"]}
    names = list(dict.fromkeys(name for given in variants.values() for name in given["figures"]))
    shown = [name for name in names if "majority" not in name]
    head = f"# {found['name']}: {found['finished']} of {found['planned']} runs\n"
    rows = [[name, *(_cell(given["figures"].get(key)) for key in shown)] for name, given in variants.items()]
    rows += [["majority", *(_majority(variants, key) for key in shown)]] if any("majority" in n for n in names) else []
    parts = [head, "Mean ± spread (sample standard deviation) over seeds, on held-out data; accuracies in percent.\n"]
    parts.append(_table(["", *shown], rows))
    parts.append(f"\nMinus {found['baseline']}, percent points, 95 % paired bootstrap over images:\n")
    groups = list(dict.fromkeys(group for gaps in found["differences"].values() for group in gaps))
    gaps = [[name, *(_gap(of.get(group)) for group in groups)] for name, of in found["differences"].items() if of]
    parts.append(_table(["", *groups], gaps))
    stages = list(dict.fromkeys(stage for given in variants.values() for stage in given["costs"]))
    parts.append("\nTrained weights; wall time of a run in s; peak memory of its process in MiB:\n")
    costs = [[name, str(len(v["seeds"])), *(_cost(v["costs"].get(s)) for s in stages)] for name, v in variants.items()]
    parts.append(_table(["", "seeds", *stages], costs))
    return "\n".join(parts) + "\n"


def _majority(variants: Mapping[str, Json], key: str) -> str:
    """The majority's score beside an accuracy: it is that of the questions, whatever the variant."""
    name = key.replace("accuracy", "majority")
    given = [v["figures"][name] for v in variants.values() if name != key and name in v["figures"]]
    return f"{given[0]['mean']:.2f}" if given else ""


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + ("" if value["spread"] is None else f" ± {value['spread']:.2f}")


def _gap(gap: Mapping[str, float] | None) -> str:
    return "" if gap is None else f"{gap['difference']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]"


def _cost(cost: Mapping[str, float] | None) -> str:
    if not cost:
        return ""
    trained = f"{cost['trainable'] / 1e6:.2f} M; " if "trainable" in cost else ""
    return f"{trained}{cost['seconds']:.0f}; {cost['peak_memory_mb']:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _json(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))
