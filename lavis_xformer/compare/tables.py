"""The Markdown of a comparison: scores beside the number of questions and the majority and blind baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lavis_xformer.markdown import table

Json = dict[str, Any]


def markdown(found: Json) -> str:
    """Return the tables of a comparison."""
    variants = {name: of for name, of in found["variants"].items() if of["seeds"]}
    parts = [
        f"# {found['name']}: {found['finished']} of {found['planned']} runs",
        "Mean ± spread (sample standard deviation) over seeds, on held-out data; accuracies in percent. An interval is "
        "a 95 % paired bootstrap over images and over the seeds that both have; ¹: over images only, since these are "
        "fewer than two, so it ignores variation between trainings. There is no correction for multiple comparisons.",
    ]
    for stage in dict.fromkeys(name.split(".")[0] for name in found["tasks"]):
        names = [name for name in found["tasks"] if name.split(".")[0] == stage]
        parts += [f"## {stage}: accuracy", asked(found["asked"][stage]), accuracy(found, variants, names)]
        for title, gaps in (
            (f"minus {found['baseline']}", found["differences"]),
            (f"{found['claim']} minus the others", found["claimed"]),
        ):
            rows = [[name, *(_gap(of.get(group)) for group in names)] for name, of in gaps.items() if of]
            if rows:
                parts += [f"### {stage}: {title}, percentage points", table(["", *_short(names)], rows)]
    for stage in dict.fromkeys(stage for of in variants.values() for stage in of["by_count"]):
        parts += [f"## {stage}: accuracy of counting (all objects, or a named group) by true count"]
        parts += [asked(found["asked"][stage]), counting(variants, stage)]
    for stage in dict.fromkeys(name.split(".")[0] for of in variants.values() for name in of["figures"]):
        parts += [f"## {stage}: other figures", asked(found["asked"][stage]), figures(variants, stage)]
    stages = list(dict.fromkeys(stage for of in variants.values() for stage in of["costs"]))
    costs = [
        [name, str(len(of["seeds"])), *(_cost(of["costs"].get(stage)) for stage in stages)]
        for name, of in variants.items()
    ]
    parts += [
        "## Costs",
        "Trained weights; mean wall time of a run in s; mean peak memory in MiB, of its GPU or process.",
        table(["", "seeds", *stages], costs),
        provenance(variants, found["code"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def asked(ways: Sequence[Json]) -> str:
    """Describe how a stage's questions were asked and scored, and which they were."""
    lines = []
    for way in ways:
        if "protocol" not in way:  # a training's own test
            continue
        protocol, files = way["protocol"], way.get("question_sha256", {})
        terms = [f"{key} {value}" for key, value in protocol.items() if key != "name" and value is not None]
        told = [f"protocol {protocol.get('name')} ({', '.join(terms)})"]
        told += [f"{key} {way[key]}" for key in ("scorer", "template") if key in way]
        told += [f"questions {sha[:12]}" for sha in files.values()]
        lines.append(f"{way.get('benchmark')} {way.get('split')}: {', '.join(told)}.")
    return " ".join(lines)


def accuracy(found: Json, variants: Mapping[str, Json], names: Sequence[str]) -> str:
    """Return a stage's accuracies: a row for every variant, then the majority baseline and the number of questions."""
    rows = []
    for name, of in variants.items():
        given = [of["accuracy"].get(key) for key in names]
        if seeds := {seed for value in given if value for seed in value["seeds"]}:
            title = f"{name} (no image)" if of["blind"] else name
            rows.append([title, str(len(seeds)), *(_cell(value) for value in given)])
    rows.append(["most frequent answer, or chance", "", *(f"{found['tasks'][name]['majority']:.1f}" for name in names)])
    asked = (f"{found['tasks'][name]['n']} ({found['tasks'][name]['images']})" for name in names)
    rows.append(["questions (images)", "", *asked])
    return table(["", "seeds", *_short(names)], rows)


def counting(variants: Mapping[str, Json], stage: str) -> str:
    """Return a stage's accuracy by true count, and the number of questions with that count."""
    found = {name: of["by_count"][stage] for name, of in variants.items() if stage in of["by_count"]}
    numbers = {count: value["n"] for of in found.values() for count, value in of.items()}
    counts = sorted(numbers, key=int)
    rows = [[name, *(_cell(of.get(count)) for count in counts)] for name, of in found.items()]
    return table(["", *counts], [*rows, ["questions", *(str(numbers[count]) for count in counts)]])


def figures(variants: Mapping[str, Json], stage: str) -> str:
    """Return a stage's figures beyond accuracies."""
    own = {name: {k: v for k, v in of["figures"].items() if k.split(".")[0] == stage} for name, of in variants.items()}
    names = list(dict.fromkeys(name for given in own.values() for name in given))
    rows = [[name, *(_cell(given.get(key), digits=3) for key in names)] for name, given in own.items() if given]
    return table(["", *_short(names)], rows)


def provenance(variants: Mapping[str, Json], now: str) -> str:
    """Say with which commits and code, and on which machines, the runs were computed; warn if it isn't code ``now``."""
    runs = {run["folder"]: run for of in variants.values() for run in of["runs"]}
    told = [
        f"{title}: {', '.join(sorted({str(run[key]) for run in runs.values() if run.get(key)})) or 'unknown'}"
        for title, key in (("Commit", "commit"), ("code", "code"), ("machine", "machine"))
    ]
    codes = {run.get("code") for run in runs.values()}
    warning = " **The runs used different code.**" if len(codes) > 1 else " **The code has changed since.**"
    return f"{len(runs)} runs. {'; '.join(told)}.{warning if codes - {now} else ''}"


def _short(names: Sequence[str]) -> list[str]:
    return [name.partition(".")[2] for name in names]


def _cell(value: Mapping[str, Any] | None, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.{digits}f}" + ("" if value["spread"] is None else f" ± {value['spread']:.{digits}f}")


def _gap(gap: Mapping[str, float] | None) -> str:
    if gap is None:
        return ""
    return f"{gap['difference']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]" + ("" if gap["seeds"] > 1 else " ¹")


def _cost(cost: Mapping[str, float] | None) -> str:
    if not cost:
        return ""
    trained = f"{cost['trainable'] / 1e6:.2f} M; " if "trainable" in cost else ""
    return f"{trained}{cost['seconds']:.0f}; {cost['peak_memory_mb']:.0f}"
