"""What a comparison runs: cells = variants x seeds x stages, each an ordinary run with its options.

A cell's folder is named after its YAML's name, its options and the cell it starts from, so comparisons share
common runs. A finished cell is kept until anything else that its result depends on changes (:mod:`.inputs`: the
YAMLs' content, assets, weights, code, versions); :meth:`Cell.stale` then says what changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lavis_xformer.compare.inputs import SOFTWARE, changes, inputs_of, read_yaml
from lavis_xformer.errors import UserError, nearest, whole
from lavis_xformer.files import read_json
from lavis_xformer.paths import project_path, shipped_folder
from lavis_xformer.run_folder import BEST

KEYS = ("extends", "output", "seeds", "baseline", "claim", "processes", "common", "variants")
STAGE_KEYS = ("config", "evaluate", "options")
#: of a variant, besides options of single stages: options of every stage, stages to skip, seeds of its own
VARIANT_KEYS = ("every", "skip", "seeds")
INPUTS, CELL = "inputs.json", "cell.json"
WEIGHTS = "model.pretrained (sha256)"  # among the inputs

Options = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A run that every variant goes through: a project's YAML and the options that override it for all variants.

    It trains, or evaluates the weights of the training stage before it.
    """

    name: str
    config: str
    options: Options
    evaluate: bool


@dataclass(frozen=True)
class Cell:
    """One run of a comparison, which leaves its results in ``folder``.

    Attributes:
        options: everything that overrides the stage's YAML.
        lenient: whether results from other code or other versions are kept.
        processes: number of processes; more than one are launched by torchrun.
    """

    variant: str
    seed: int
    stage: Stage
    options: Options
    folder: Path
    lenient: bool = False
    processes: int = 1

    @property
    def finished(self) -> bool:
        """Whether it ran to its end and nothing that its result depends on has changed."""
        return (self.folder / CELL).is_file() and not self.stale()

    def inputs(self) -> dict[str, str]:
        """Return everything its result depends on, as it is now; not where the results lie."""
        place = json.dumps(f"{self.folder.parent}/").strip('"')  # as the values, which are JSON, have it
        found = inputs_of(self.stage.config, self.options)
        return {name: value.replace(place, "") for name, value in found.items()}

    def stale(self) -> list[str]:
        """Return what has changed since it was run, completely or partly: ``name: before -> after``.

        Weights that it started from and that are gone have not changed; nothing could be run again from them.
        """
        note = self.folder / INPUTS
        if not note.is_file():
            return []
        before, now = read_json(note), self.inputs()
        if WEIGHTS not in now and WEIGHTS in before:
            now[WEIGHTS] = before[WEIGHTS]
        differing = changes(before, now)
        return [line for line in differing if not (self.lenient and line.split(":")[0] in SOFTWARE)]

    def arguments(self) -> list[str]:
        """Return the command line after ``python``."""
        module = "lavis.evaluate" if self.stage.evaluate else "lavis.train"
        many = f"-m torch.distributed.run --standalone --nproc_per_node={self.processes}".split()
        together = many if self.processes > 1 else []
        return [*together, "-m", module, "--cfg-path", self.stage.config, "--options", *self.option_texts()]

    def option_texts(self) -> list[str]:
        """Return its options as ``key=value``."""
        return [f"{key}={as_text(value)}" for key, value in self.options.items()]


@dataclass(frozen=True)
class Plan:
    """A comparison, named after its YAML.

    Attributes:
        output: folder of the results; the cells are in its subfolder ``cells``.
        baseline: the variant that the others are compared with.
        seeds: seeds of every variant that has none of its own.
        stages: in order; a training passes its best weights on to the stages after it.
        variants: name to the options it changes.
        claim: the variant that is compared with every other one, each control included; "" for none.
    """

    name: str
    output: Path
    baseline: str
    seeds: tuple[int, ...]
    stages: tuple[Stage, ...]
    variants: dict[str, dict[str, Any]]
    lenient: bool = False
    processes: int = 1
    claim: str = ""

    def cells(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Cell]:
        """Return the cells in an order in which they can run, of some variants and seeds or of all.

        Raises:
            UserError: there is no such variant, or none of them has such a seed.
        """
        for name in only:
            if name not in self.variants:
                raise UserError(f"--only {name}: {self.name} has no such variant; {nearest(name, self.variants)}")
        chosen = {name: variant for name, variant in self.variants.items() if not only or name in only}
        pairs = [(name, seed) for name, variant in chosen.items() for seed in variant.get("seeds", self.seeds)]
        for seed in seeds:
            if seed not in (known := {own for _, own in pairs}):
                whose = ", ".join(only) or self.name
                raise UserError(f"--seeds {seed}: {whose} has no such seed; {nearest(str(seed), map(str, known))}")
        return [cell for name, seed in pairs if not seeds or seed in seeds for cell in self._chain(name, seed)]

    def _chain(self, name: str, seed: int) -> list[Cell]:
        """A variant's stages of one seed, each starting from the weights of the training before it."""
        cells: list[Cell] = []
        variant, weights = self.variants[name], None
        for stage in self.stages:
            if stage.name in variant.get("skip", ()):
                continue
            own = (variant.get("every") or {}) | (variant.get(stage.name) or {})
            options = {**stage.options, **own, "run.seed": seed}
            given = stage.options | (variant.get(stage.name) or {})
            named: dict[str, Any] = {"processes": self.processes} if self.processes > 1 else {}  # of larger batches
            if weights is not None and "model.pretrained" not in given:
                options["model.pretrained"] = str(weights)
                named["model.pretrained"] = weights.parent.name  # wherever the results lie
            folder = self.output / "cells" / f"{stage.name}-seed{seed}-{digest(stage.config, options | named)}"
            options |= {"run.output_dir": str(folder.parent), "run.job_id": folder.name}
            if not stage.evaluate:
                options["run.resume"], weights = "auto", folder / BEST
            cells.append(Cell(name, seed, stage, options, folder, self.lenient, self.processes))
        return cells


def read_plan(path: str) -> Plan:
    """Read a comparison's YAML.

    Args:
        path: a file, or one of the shipped ``projects/``. ``extends`` names another such YAML, next to it or shipped,
            from which this one states its differences: ``common`` may then override a stage's ``config`` or
            ``evaluate`` and add options, and a variant with nothing after its name is taken from the other.

    Raises:
        UserError: a file, key or value is missing or wrong.
    """
    file = project_path(path)
    content = _read(file)
    for key in ("output", "seeds", "baseline", "common", "variants"):
        if not content.get(key):
            raise UserError(f"{file}: '{key}' is missing")
    stages = tuple(_stage(file, name, given or {}) for name, given in content["common"].items())
    names = [stage.name for stage in stages]
    for variant, given in content["variants"].items():
        where = f"{file}: variants.{variant}"
        if not isinstance(skipped := given.get("skip", []), list):
            raise UserError(f"{where}.skip: {skipped} is not a list of stages, such as [{names[0]}]")
        for key in [*given, *skipped]:
            if key not in (*VARIANT_KEYS, *names):
                raise UserError(f"{where}.{key}: {nearest(key, (*VARIANT_KEYS, *names))}")
        for key in ("every", *names):
            _mapping(f"{where}.{key}", given.get(key))
        _seeds(f"{where}.seeds", given.get("seeds", []))
    for key in ("baseline", "claim"):
        if (named := content.get(key)) and str(named) not in content["variants"]:
            raise UserError(f"{file}: {key}: no variant '{named}'; {nearest(named, content['variants'])}")
    return Plan(
        name=file.stem,
        output=Path(str(content["output"])).absolute(),
        baseline=str(content["baseline"]),
        seeds=_seeds(f"{file}: seeds", content["seeds"]),
        stages=stages,
        variants=content["variants"],
        processes=whole(f"{file}: processes", content.get("processes", 1), least=1),
        claim=str(content.get("claim") or ""),
    )


def digest(config: str, options: Mapping[str, Any]) -> str:
    """Return a hash, of eight characters, of a YAML's name and the options."""
    return hashlib.sha256((config + json.dumps(options, sort_keys=True)).encode()).hexdigest()[:8]


def as_text(value: object) -> str:
    """Write an option's value as ``--options`` reads it: text as it is, in quotes if YAML would read it otherwise."""
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            if yaml.safe_load(value) == value:
                return value
    return json.dumps(value, ensure_ascii=False)


def _seeds(key: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(type(seed) is int and seed >= 0 for seed in given):
        raise UserError(f"{key}: {given} is not a list of integers from 0 on, such as [1, 2, 3]")
    if len(set(given)) < len(given):
        raise UserError(f"{key}: {given} names a seed twice")
    return tuple(given)


def _mapping(key: str, given: Any) -> dict[str, Any]:
    """Return the mapping under a key; nothing counts as an empty one."""
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{key}: {given} is not a mapping of keys to values")
    return given or {}


def _read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML and the one it extends; ``above`` are those that extend it, which it can't extend in turn."""
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a comparison: it has none of {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{file}: '{key}' is no key of a comparison; {nearest(key, KEYS)}")
    for section in ("common", "variants"):
        for name, given in _mapping(f"{file}: {section}", content.get(section)).items():
            if not isinstance(name, str):
                raise UserError(f"{file}: {section}: YAML doesn't read the name {name!r} as text; put it in quotes")
            _mapping(f"{file}: {section}.{name}", given)
    for given in (content.get("common") or {}).values():
        config = (given or {}).get("config")
        if isinstance(config, str) and not Path(config).is_file() and (beside := file.parent / config).is_file():
            given["config"] = str(beside.absolute())
    variants: dict[str, Any] = content.get("variants") or {}
    if "extends" not in content:
        return content | {"variants": {name: given or {} for name, given in variants.items()}}
    above = (*above, file.resolve())
    base = _read(_extended(file, str(content["extends"]), above), above)
    for name, given in variants.items():
        if given is None and name not in base["variants"]:
            raise UserError(f"{file}: variants.{name}: {content['extends']} has no such variant")
    own = {name: base["variants"][name] if given is None else given for name, given in variants.items()}
    stages, more = base.get("common") or {}, content.get("common") or {}
    for name in more:
        if name not in stages:
            raise UserError(f"{file}: common.{name}: {content['extends']} has no such stage; {nearest(name, stages)}")
    common = {name: _changed(f"{file}: common.{name}", stage, more.get(name) or {}) for name, stage in stages.items()}
    variants = own or base["variants"]
    claim = content.get("claim", base.get("claim") if base.get("claim") in variants else None)
    return {**base, **content, "common": common, "variants": variants, "claim": claim}


def _changed(where: str, stage: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage of an extended YAML, overridden by ``more``: keys of a stage, and options, which have a dot."""
    for key in more:
        if key not in STAGE_KEYS and "." not in key:
            raise UserError(f"{where}.{key}: {nearest(key, STAGE_KEYS)}, and options such as run.max_epoch")
    own = {key: value for key, value in more.items() if key in STAGE_KEYS}
    options = {key: value for key, value in more.items() if key not in STAGE_KEYS}
    return {**stage, **own, "options": {**(stage.get("options") or {}), **(own.get("options") or {}), **options}}


def _extended(file: Path, name: str, above: Sequence[Path]) -> Path:
    """Find the YAML to extend: next to ``file``, here, or shipped; a shipped one may have ``file``'s own name."""
    projects = shipped_folder("projects")
    shipped = projects / "xformer" / "compare"
    for folder in (file.parent, Path(), projects.parent, shipped):
        if (folder / name).is_file() and (folder / name).resolve() not in above:
            return folder / name
    known = nearest(name, [path.name for path in shipped.glob("*.yaml")])
    raise UserError(f"{file}: extends: there is no {name} next to it, here or shipped with lavis_xformer; {known}")


def _stage(file: Path, name: str, given: Mapping[str, Any]) -> Stage:
    for key in given:
        if key not in STAGE_KEYS:
            raise UserError(f"{file}: common.{name}.{key}: {nearest(key, STAGE_KEYS)}")
    where = f"{file}: common.{name}"
    if "." in name:
        raise UserError(f"{where}: a stage's name can't have a dot")
    if not isinstance(config := given.get("config"), str):
        found = "missing" if config is None else repr(config)
        raise UserError(f"{where}.config is {found}; it must name a project's YAML")
    if not isinstance(evaluate := given.get("evaluate", False), bool):
        raise UserError(f"{where}.evaluate is {evaluate!r}; it must be true or false")
    return Stage(name, config, _mapping(f"{where}.options", given.get("options")), evaluate)
