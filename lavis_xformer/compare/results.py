"""The results of a comparison: means and spreads over seeds, and differences with their intervals.

Only files are read: ``cell.json`` and ``summary.json`` of finished cells, and the answers in ``result/*.json``.
Accuracies are in percent.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lavis_xformer.compare.bootstrap import paired_bootstrap
from lavis_xformer.compare.inputs import code
from lavis_xformer.compare.plan import CELL, Cell, Plan
from lavis_xformer.files import read_json
from lavis_xformer.run_folder import SUMMARY

Json = dict[str, Any]
Key = tuple[Any, ...]

_MEASURED = ("i2t_r1", "t2i_r1", "itm_accuracy", "loss_rec", "rec_mae", "caption_f1")
#: the figures of a training's test that the table shows
SHOWN = (*_MEASURED, *(f"chance_{name}" for name in _MEASURED))
#: a training's figures on its validation split, at its best epoch: what a setting is chosen by
VALIDATED = {"loss": "val_loss", "agg_metrics": "val_score"}
#: prefixes of the figures shown if an evaluation's answers are compared one by one; of other evaluations, all are shown
ASKED = (
    *("mae", "rmse", "f1", "yes_ratio", "unread", "pair_accuracy", "accuracy_semantic", "majority_semantic"),
    *("Bleu", "METEOR", "ROUGE_L", "SPICE", "CIDEr_", "txt_r", "img_r"),
)
HOW = ("benchmark", "split", "protocol", "scorer", "template", "question_sha256")  # belongs with every number
COUNTS = ("count", "count_group")
ALL = "all"
RESAMPLES = 2000


def collect(plan: Plan) -> Json:
    """Return everything about the finished cells of a comparison, ready for JSON."""
    cells = plan.cells()
    done = [cell for cell in cells if cell.finished]
    variants = {name: of_variant([cell for cell in done if cell.variant == name]) for name in plan.variants}
    base = variants[plan.baseline]["answers"]
    claim = variants[plan.claim]["answers"] if plan.claim else []
    return {
        "name": plan.name,
        "baseline": plan.baseline,
        "claim": plan.claim,
        "code": code(),
        "planned": len({cell.folder for cell in cells}),
        "finished": len({cell.folder for cell in done}),
        "asked": {
            stage.name: distinct(way for of in variants.values() for way in of["asked"].get(stage.name, ()))
            for stage in plan.stages
        },
        "tasks": tasks([answer for of in variants.values() for answer in of["answers"]]),
        "variants": variants,
        "differences": {
            name: differences(of["answers"], base) for name, of in variants.items() if name != plan.baseline
        },
        "claimed": {name: differences(claim, of["answers"]) for name, of in variants.items() if name != plan.claim},
        "plan": {"seeds": plan.seeds, "variants": plan.variants, "stages": [vars(stage) for stage in plan.stages]},
    }


def of_variant(cells: Sequence[Cell]) -> Json:
    """Return a variant's costs, figures, accuracies (by seed), protocols, provenance and answers."""
    costs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    values: dict[str, dict[int, float]] = defaultdict(dict)
    asked: dict[str, list[Json]] = defaultdict(list)
    answers: list[Json] = []
    runs, blind = [], False
    for cell in cells:
        note = read_json(cell.folder / CELL)
        runs.append({"folder": str(cell.folder)} | {key: note.get(key) for key in ("commit", "code", "machine")})
        for key in ("seconds", "peak_memory_mb", "trainable"):
            if note.get(key) is not None:
                costs[cell.stage.name][key].append(note[key])
        results = list(_results(cell))
        for name, value in _figures(cell, results):
            values[f"{cell.stage.name}.{name}"][cell.seed] = value
        for result in results:
            if how := {key: result[key] for key in HOW if key in result}:
                asked[cell.stage.name].append(how)
            blind = blind or bool(result.get("blind"))
            answers += [{**answer, "seed": cell.seed, "stage": cell.stage.name} for answer in _scored(cell, result)]
    return {
        "seeds": sorted({cell.seed for cell in cells}),
        "blind": blind,
        "asked": {stage: distinct(ways) for stage, ways in asked.items()},
        "costs": {stage: {key: fmean(given) for key, given in cost.items()} for stage, cost in costs.items()},
        "figures": {name: {**mean_and_spread(given.values()), "seeds": given} for name, given in values.items()},
        "accuracy": accuracies(answers),
        "by_count": by_count(answers),
        "runs": runs,
        "answers": answers,
    }


def distinct(ways: Iterable[Json]) -> list[Json]:
    """Return each way of asking once: protocol, scorer, template and questions."""
    return list({json.dumps(way, sort_keys=True): way for way in ways}.values())


def _results(cell: Cell) -> Iterator[Json]:
    """Results written by an evaluation, or by a training for its test splits; lists by LAVIS's tasks are skipped."""
    folder = cell.folder / "result"
    if cell.stage.evaluate:
        files = sorted(folder.glob("*.json"))
    else:
        files = [folder / f"{split}_scores.json" for split in read_json(cell.folder / SUMMARY)["test"]]
    for file in filter(Path.exists, files):
        if isinstance(result := read_json(file), dict) and "figures" in result:
            yield result


def _scored(cell: Cell, result: Json) -> list[Json]:
    """The answers that were scored one by one; of a training, not those to questions, which an evaluation asks."""
    scored = [answer for answer in result.get("answers", []) if "correct" in answer]
    return scored if cell.stage.evaluate else [answer for answer in scored if answer["group"] in _MEASURED]


def _figures(cell: Cell, results: Iterable[Json]) -> Iterable[tuple[str, float]]:
    """Figures of one run: a training's on its test and validation splits, an evaluation's except its accuracies."""
    for result in results:
        scored = bool(_scored(cell, result))
        for name, value in result["figures"].items():
            if isinstance(value, int | float) and name != "agg_metrics" and (not scored or name.startswith(ASKED)):
                yield name, value
    if not cell.stage.evaluate:
        paired = {answer["group"] for result in results for answer in _scored(cell, result)}
        told = [name for name in SHOWN if name.removeprefix("chance_") not in paired]
        summary = read_json(cell.folder / SUMMARY)
        for figures in summary["test"].values():
            yield from ((name, value) for name, value in (figures or {}).items() if name in told)
        best = summary.get("best") or {}
        yield from ((title, best[name]) for name, title in VALIDATED.items() if name in best)


def mean_and_spread(values: Iterable[float]) -> Json:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    given = list(values)
    return {"mean": fmean(given), "spread": stdev(given) if len(given) > 1 else None}


def groups_of(answers: Iterable[Json]) -> dict[str, list[Json]]:
    """Return the answers by stage and group, preceded by a stage's answers together if it has several groups."""
    stages: dict[str, dict[str, list[Json]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        stages[answer["stage"]][answer["group"]].append(answer)
    found: dict[str, list[Json]] = {}
    for stage, groups in stages.items():
        if len(groups) > 1:
            found[f"{stage}.{ALL}"] = [answer for members in groups.values() for answer in members]
        found |= {f"{stage}.{group}": members for group, members in sorted(groups.items())}
    return found


def tasks(answers: Iterable[Json]) -> Json:
    """Return what is asked: for every group, the number of questions and images, and the score of a guess.

    For an answer, this is its own ``guess`` if it has one (chance, or the majority answer under a soft metric; the
    mean where models and seeds differ in it), otherwise whether its truth is the most frequent one of its group.
    """
    asked: dict[Key, list[Json]] = defaultdict(list)
    for answer in answers:
        asked[_key(answer)].append(answer)
    found: Json = {}
    for name, members in groups_of(map(_with_mean_guess, asked.values())).items():
        truths: dict[str, Counter[str]] = defaultdict(Counter)
        for answer in members:
            truths[answer["group"]][str(answer.get("truth"))] += 1
        most = {group: counter.most_common(1)[0][0] for group, counter in truths.items()}
        right = [answer.get("guess", str(answer.get("truth")) == most[answer["group"]]) for answer in members]
        found[name] = {
            "n": len(members),
            "images": len({answer["image"] for answer in members}),
            "majority": 100 * fmean(right),
            "majority_answer": "; ".join(most.values()),
        }
    return found


def _with_mean_guess(same: Sequence[Json]) -> Json:
    """One answer of several to a question, with the mean of their guesses: chance may depend on what a model says."""
    guesses = [answer["guess"] for answer in same if "guess" in answer]
    return {**same[0], "guess": fmean(guesses)} if guesses else same[0]


def accuracies(answers: Sequence[Json]) -> Json:
    """Return every group's accuracy: mean, spread, by seed, and the bootstrap interval of the mean."""
    return {name: accuracy(members) for name, members in groups_of(answers).items()}


def accuracy(answers: Sequence[Json]) -> Json:
    """Return the accuracy of some answers: mean, spread, by seed, number of questions, and the mean's interval."""
    seeds = by_seed(answers)
    percent = {seed: 100 * fmean(row["correct"] for row in rows.values()) for seed, rows in seeds.items()}
    common = _common(seeds.values())
    scores = [[rows[key]["correct"] for key in common] for rows in seeds.values()]
    gap = bootstrap(scores, [[0.0] * len(common)] * len(seeds), common)
    return {
        **mean_and_spread(percent.values()),
        "seeds": percent,
        "n": len(common),
        "low": gap["low"],
        "high": gap["high"],
    }


def by_count(answers: Sequence[Json]) -> Json:
    """Return the accuracy of counting questions, of all objects and of named groups, by stage and true count."""
    stages: dict[str, dict[int, list[Json]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        if answer["kind"] in COUNTS:
            stages[answer["stage"]][int(answer["truth"])].append(answer)
    return {
        stage: {str(count): accuracy(members) for count, members in sorted(counts.items())}
        for stage, counts in stages.items()
    }


def differences(ours: Sequence[Json], theirs: Sequence[Json]) -> Json:
    """Return the difference in accuracy, in percentage points, over all questions and in every group.

    Only questions and seeds common to both are used. Seeds are paired and, if several, resampled together with
    the images (``seeds`` is their number). If they share none, a question's score is its mean over all seeds of each
    model, and ``seeds`` is 1: the interval covers the images only.
    """
    others = groups_of(theirs)
    found = {}
    for name, members in groups_of(ours).items():
        first, second = by_seed(members), by_seed(others.get(name, []))
        paired = [seed for seed in first if seed in second]
        mine, other = ([of[seed] for seed in paired or of] for of in (first, second))
        common = _common([*mine, *other]) if other else []
        if not common:
            continue
        left, right = ([[float(rows[key]["correct"]) for key in common] for rows in of] for of in (mine, other))
        if not paired:
            left, right = ([[fmean(column) for column in zip(*of, strict=True)]] for of in (left, right))
        found[name] = {"n": len(common), "seeds": len(left), **bootstrap(left, right, common)}
    return found


def bootstrap(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], keys: Sequence[Key]) -> Json:
    """Return the difference of two tables of scores (seeds by questions), in percentage points, and its interval."""
    images = [(stage, image) for stage, _, image, _ in keys]
    gap = paired_bootstrap(first, second, clusters=images, resamples=RESAMPLES)
    return {"difference": 100 * gap.difference, "low": 100 * gap.low, "high": 100 * gap.high}


def by_seed(answers: Iterable[Json]) -> dict[int, dict[Key, Json]]:
    """Return the answers of every seed by question."""
    found: dict[int, dict[Key, Json]] = defaultdict(dict)
    for answer in answers:
        found[answer["seed"]][_key(answer)] = answer
    return dict(sorted(found.items()))


def _key(answer: Json) -> Key:
    return (answer["stage"], answer["question_id"], answer["image"], answer["question"])


def _common(tables: Iterable[Mapping[Key, Json]]) -> list[Key]:
    """The questions that are in every table, in the order of the first."""
    first, *rest = tables
    return [key for key in first if all(key in table for table in rest)]
