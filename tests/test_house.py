"""The directions of import that CONTRIBUTING names, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import lavis_xformer

PACKAGE = Path(lavis_xformer.__file__).parent
HEAVY = ("lavis.*", "torch.*", "transformers.*", "numpy.*")
ROOMS = tuple("models data tasks runners engine analysis mini probe cli train evaluate config".split())

DATA_BUT_GUARD = [f"data.{path.stem}" for path in PACKAGE.joinpath("data").glob("[a-z]*") if path.stem != "guard"]


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"lavis_xformer.{name}.*" for name in names)


#: (modules, what they may not import): names are matched as patterns, with ".*" for a module and all below it
RULES = [
    # 1. parts that know neither LAVIS nor a configuration
    (("losses", "distributed", "images", "state_dicts"), ("lavis.*", "transformers.*", "omegaconf.*", *rooms(*ROOMS))),
    (("tasks.metrics", "tasks.answers"), ("lavis.*", "transformers.*", "omegaconf.*")),
    (("models.fusion", "models.frozen"), ("lavis.*", "transformers.*", "omegaconf.*")),
    (("models.mae", "models.meta_mae"), ("lavis.*", "omegaconf.*")),
    # 2. models: no data, no training; the stages know nothing of each other, LAVIS's Q-Former has one door
    (("models.*",), rooms("data", "tasks", "runners", "engine", "analysis", "cli", "train", "config")),
    (("models.stage1*",), rooms("models.stage2")),
    (("models.stage2*",), rooms("models.stage1")),
    (("models.stage*", "models.features", "models.checkpoints"), ("lavis.models.blip2_models.Qformer.*",)),
    (("models.stage*", "models.generation", "models.base"), ("lavis.models.blip2_models.modeling_*",)),
    # 3. data knows no model; scenes know neither LAVIS nor torch
    (("data.*",), (*rooms("models", "tasks", "runners", "engine", "analysis", "cli", "train"), "lavis.models.*")),
    (("data.scenes.*",), ("lavis.*", "torch.*", "torchvision.*")),
    # 4. tasks and runner reach a model through the registry and its methods; data has one door, the guard
    (
        ("tasks.*", "runners.xformer", "runners.schedules", "engine.*"),
        (*rooms("models", "data", "mini", "probe"), "lavis.models.*"),
    ),
    (
        ("runners.portable",),
        (*rooms("models", "mini", "probe", *DATA_BUT_GUARD), "lavis.models.*"),
    ),
    # 5. a report is made of files, and so is a comparison, whose runs are processes of their own
    (("engine.*",), (*rooms("config"), "lavis.*")),
    (("compare.*",), (*rooms("models", "data", "tasks", "runners", "engine", "config"), "lavis.*")),
    (("analysis.report",), (*rooms("models", "data", "tasks", "runners", "engine", "config"), "lavis.*")),
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names of modules and of what is taken from them: ``from a import b`` gives a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(f"{name}.", pattern) for pattern in patterns)


@pytest.mark.parametrize(("modules", "forbidden"), RULES, ids=lambda value: ",".join(value)[:40])
def test_directions_of_import(modules: tuple[str, ...], forbidden: tuple[str, ...]):
    chosen = {n: p for n, p in SOURCES.items() if any(fnmatchcase(n, m) or f"{n}.*" == m for m in modules)}
    assert chosen, f"no module is called {modules}"
    wrong = [
        f"{name} imports {imported}"
        for name, path in chosen.items()
        for imported in imports(ast.walk(ast.parse(path.read_text())))
        if matches(imported, forbidden)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_can_fail():
    source = "def f():\n from lavis.models import blip2\n import lavis_xformer.data.x"
    found = list(imports(ast.walk(ast.parse(source))))
    assert matches(found[1], ("lavis.models.*",))
    assert matches(found[-1], rooms("data"))
    assert not matches("lavis_xformer.models", ("lavis.*",))


@pytest.mark.parametrize("name", ["", "autoload", "errors", "paths", "files", "versions", "cli", "doctor"])
def test_light_modules_import_nothing_heavy_at_their_head(name: str):
    head = ast.parse(SOURCES[name or "__init__"].read_text()).body
    assert not [imported for imported in imports(head) if matches(imported, HEAVY)]


def test_setup_declares_every_package_that_is_imported():
    declared = (PACKAGE.parent / "setup.py").read_text()
    other_names = {"PIL": "pillow", "yaml": "pyyaml", "lavis": "salesforce-lavis"}
    found = {name.split(".")[0] for path in SOURCES.values() for name in imports(ast.walk(ast.parse(path.read_text())))}
    found -= {*sys.stdlib_module_names, "lavis_xformer"}
    assert not [name for name in sorted(found) if f'"{other_names.get(name, name)}' not in declared]


def test_importing_the_package_imports_neither_torch_nor_lavis():
    code = "import sys, lavis_xformer, lavis_xformer.cli; print({'torch', 'lavis', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
