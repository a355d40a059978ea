"""What a run's result depends on, so that no stale result is kept unnoticed.

That is: its configuration (the default YAMLs of model and datasets, its own YAML, its options), the sha256 of every
shipped asset and every file that the configuration names (weights, question files; not the images of a folder), the
code of this package and the versions of its numerical libraries. Comments, formatting and docstrings don't count, nor
does code that doesn't change a result (:data:`APART`).
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lavis_xformer import assets
from lavis_xformer.errors import UserError, fault_in_yaml
from lavis_xformer.files import read_json, sha256
from lavis_xformer.paths import cache_folder, own_modules, project_path, shipped_folder
from lavis_xformer.versions import versions_of

PACKAGE = Path(assets.__file__).parent
#: modules that compare, report, check or build, but don't change a result
APART = frozenset("analysis arguments compare conclude mini probe cli __main__ doctor export markdown".split())
LIBRARIES = ("salesforce-lavis", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")
SOFTWARE = ("code", "python", *LIBRARIES)
PLACES = ("run.output_dir", "run.job_id", "run.resume")  # where a run is stored, not what it computes

Json = dict[str, Any]
_PARSING = threading.Lock()  # in two threads at once Python 3.11's parser may raise SystemError


def inputs_of(config: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return everything that the result of a run depends on, by name; ``options`` override its YAML by dotted key."""
    leaves = dict(flat(resolved(config, options)))
    found = {key: json.dumps(value) for key, value in leaves.items() if key not in PLACES}
    for key, value in leaves.items():
        named = content(value, folders=key.startswith("model.")) if isinstance(value, str) and key in found else None
        if named is not None:
            found[f"{key} (sha256)"] = named
    return {**found, "code": code(), **versions()}


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return ``name: before -> after`` for all that differs."""
    names = sorted(before.keys() | after.keys(), key=lambda name: (name == "code", name))
    return [
        f"{name}: {before.get(name, 'nothing')} -> {after.get(name, 'nothing')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def resolved(config: str, options: Mapping[str, Any]) -> Json:
    """Return a run's configuration: the defaults of its model type and datasets, its YAML, its options.

    Where it names no type, the defaults of all types of its model take part, so that a change in any is noticed.
    """
    user = _mapping(project_path(config))
    for key, value in options.items():
        *sections, name = key.split(".")
        place = user
        for section in sections:
            place[section] = dict(place.get(section) or {})
            place = place[section]
        place[name] = merge(place.get(name), value)
    user["datasets"] = {name: given or {} for name, given in (user.get("datasets") or {}).items()}
    model: Json = user.get("model") or {}
    merged: Json = {}
    for file in sorted(shipped_folder("configs").glob("models/*.yaml")):
        own = _mapping(file)["model"]
        if own["arch"] == model.get("arch") and model.get("model_type") in (None, own["model_type"]):
            merged = merge(merged, {"model": own})
    for name, given in user["datasets"].items():
        kind = given.get("type", "default")
        for file in sorted(_dataset_defaults(), key=lambda file: (file.stem.startswith(kind), file)):  # its type's last
            own = (_mapping(file).get("datasets") or {}).get(name) or {}
            merged = merge(merged, {"datasets": {name: own}})
    return merge(merged, user)


@functools.cache
def _dataset_defaults() -> list[Path]:
    """The default YAMLs of datasets: LAVIS's, found without importing it, and this package's."""
    spec = importlib.util.find_spec("lavis")
    assert spec is not None
    assert spec.origin is not None
    lavis = Path(spec.origin).parent
    return [*lavis.glob("configs/datasets/**/*.yaml"), *shipped_folder("configs").glob("datasets/*.yaml")]


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: it is not YAML, not UTF-8 text, or has a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.YAMLError as error:
        where, problem = fault_in_yaml(error)
        raise UserError(f"{path} is not valid YAML{where}: {problem}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, of which PyYAML would silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping as it is written, before ``<<`` adds others to it."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]:
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def merge(first: Any, second: Any) -> Any:
    """Return ``first`` changed by ``second``, mapping by mapping."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    return {**first, **{key: merge(first.get(key), value) for key, value in second.items()}}


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf by its dotted path; list items by their index."""
    if isinstance(values, (dict, list)) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def content(value: str, *, folders: bool = False) -> str | None:
    """Return the sha256 of what a value names: an asset, a file, or the files of a folder; None for other values."""
    if value.startswith(assets.SCHEME):
        group, _, part = value.removeprefix(assets.SCHEME).partition("/")
        file = assets.ROOT / group / assets.SUMS
        sums = read_json(file) if file.is_file() else {}
        return _digest({name: of for name, of in sums.items() if name.startswith(f"{part}/")})
    path = Path(os.path.expandvars(value)).expanduser()
    if not os.path.exists(path):
        path = cache_folder() / path  # where LAVIS's datasets are, by default
    if os.path.isfile(path):  # unlike pathlib's, False for a text too long for a path
        return _file(path, path.stat().st_size, path.stat().st_mtime_ns)
    if folders and "/" in value and os.path.isdir(path):  # a name such as "mini" means no folder, even if one is here
        return _digest({file.name: content(str(file)) for file in sorted(path.iterdir()) if file.is_file()})
    return None


@functools.cache
def code() -> str:
    """Return a hash, of twelve characters, of the code of this package that runs execute."""
    return code_now()


def code_now() -> str:
    """Return :func:`code` for the files as they are now, not as they were when this process first asked."""
    trees = {}
    with _PARSING:
        for path in sorted(PACKAGE.rglob("*.py")):
            name = path.relative_to(PACKAGE)
            if name.parts[0].removesuffix(".py") not in APART:
                trees[name.as_posix()] = _tree(path)
        for own in own_modules():
            origin = getattr(importlib.util.find_spec(own), "origin", None)
            path = Path(origin or own)
            files = path.parent.rglob("*.py") if path.name == "__init__.py" else [path]
            inside = [file for file in sorted(files) if file.is_file()]
            trees |= {f"{own}: {file.relative_to(path.parent).as_posix()}": _tree(file) for file in inside}
    return _digest(trees)


def _tree(path: Path) -> str:
    return ast.dump(without_comments(ast.parse(path.read_text(encoding="utf-8"))))


def without_comments(tree: ast.AST) -> ast.AST:
    """Remove docstrings, and other strings that stand alone, from a module, in place."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [statement for statement in body if not _is_bare_string(statement)]  # type: ignore[attr-defined]
    return tree


def _is_bare_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def versions() -> dict[str, str]:
    """Return the versions of Python and of :data:`LIBRARIES`."""
    return {"python": ".".join(platform.python_version_tuple()[:2]), **versions_of(LIBRARIES)}


def commit() -> str | None:
    """Return a clone's commit, with ``+`` if tracked files differ from it; None outside a clone."""

    def _git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True).stdout

    try:
        return _git("rev-parse", "--short=10", "HEAD").strip() + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _mapping(file: Path) -> Json:
    return copy.deepcopy(_parsed(file, file.stat().st_size, file.stat().st_mtime_ns))


@functools.cache
def _parsed(path: Path, size: int, changed: int) -> Json:
    found = read_yaml(path)
    return found if isinstance(found, dict) else {"": found}


@functools.cache
def _file(path: Path, size: int, changed: int) -> str:
    """Size and modification time serve only as keys of the cache."""
    return sha256(path)[:12]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
