"""``lavis-xformer doctor``: what is wrong with this environment, or with a run's YAML, and how to fix it.

Versions are read from the installed packages' metadata, and whatever may crash is imported in a separate
process: the doctor works where nothing else does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from lavis_xformer.arguments import command_parser
from lavis_xformer.assets import resolve
from lavis_xformer.autoload import SWITCH, LavisFinder
from lavis_xformer.errors import UserError
from lavis_xformer.paths import CACHE_VARIABLE, cache_folder
from lavis_xformer.versions import version_of

PACKAGE = "lavis_xformer"
LAVIS = "salesforce-lavis"
FREE_BYTES = 1 << 30  # of disk, so that a run's checkpoints fit

#: why a version outside the range fails, where that is known
REASONS = {
    "numpy": "the OpenCV that LAVIS pins was built for numpy 1 and fails to import with numpy 2",
    "transformers": "LAVIS 1.0.2 was written for 4.25 and 4.26; later versions changed what it calls",
    "timm": "LAVIS's vision transformers import names that only this version has",
    LAVIS: "other versions register other names and have another API",
}

# Imported one by one; prints a JSON line after each, so that a crash names the package at fault.
PROBE = """
import importlib, json, warnings
warnings.simplefilter("ignore")
for name in ("numpy", "torch", "torchvision", "cv2", "transformers", "decord", "lavis", "lavis_xformer"):
    print(json.dumps({"importing": name}), flush=True)
    module = importlib.import_module(name)
    if name == "lavis_xformer":
        module.register()
import torch
gpu = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if gpu else None,
    "bf16": bool(gpu and torch.cuda.is_bf16_supported()),
}))
"""


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``remedy`` says how to fix it, or what follows from it."""

    subject: str
    verdict: Literal["ok", "note", "WRONG"]
    found: str
    remedy: str = ""


def main(argv: Sequence[str]) -> int:
    """Run all checks, print a line for each, and return 1 where something is wrong, else 0."""
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--cfg-path", help="a run's YAML, whose names, keys and paths are checked too")
    parser.add_argument("--options", nargs="+", action="extend", default=[], help="section.key=value, as for the run")
    arguments = parser.parse_args(argv)
    if arguments.options and not arguments.cfg_path:
        parser.error("--options needs a --cfg-path")
    findings: list[Finding] = []
    for finding in examine(arguments.cfg_path, arguments.options):
        print(render(finding), flush=True)
        findings.append(finding)
    wrong = sum(finding.verdict == "WRONG" for finding in findings)
    print(f"\n{wrong} of {len(findings)} checks found something wrong" if wrong else "\nAll is well")
    return int(wrong > 0)


def examine(cfg_path: str | None = None, options: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield the findings of every check, the quick ones first."""
    yield check_python(sys.version_info[:2])
    packages = list(check_packages(requirements(PACKAGE) + requirements(LAVIS), version_of))
    yield from packages
    yield check_torchvision(requirements("torchvision"), version_of("torch"))
    yield check_registration(any(isinstance(finder, LavisFinder) for finder in sys.meta_path))
    yield check_folder("cache folder", cache_folder(), f"set {CACHE_VARIABLE} to a folder that can be written")
    yield check_folder("current folder", Path.cwd(), "output goes here: start runs from another folder")
    imports = list(check_imports(run_probe()))
    yield from imports
    if cfg_path is not None and all(finding.verdict != "WRONG" for finding in imports):
        yield from check_yaml(cfg_path, options)


def render(finding: Finding) -> str:
    """Return the finding as a line, its remedy as a second one."""
    line = f"{finding.verdict:<6} {finding.subject:<28} {finding.found}"
    return f"{line}\n       -> {finding.remedy}" if finding.remedy else line


def requirements(name: str) -> list[Requirement]:
    """Return what an installed package requires on this platform; empty if it is not installed."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def check_python(version: tuple[int, ...]) -> Finding:
    """LAVIS 1.0.2 runs on 3.10 and 3.11: tokenizers 0.13 has no wheel for 3.12."""
    text = ".".join(map(str, version))
    if version in ((3, 10), (3, 11)):
        return Finding("Python", "ok", text)
    remedy = "make an environment with Python 3.10 or 3.11 (tokenizers 0.13, which LAVIS needs, has no wheel for 3.12)"
    return Finding("Python", "WRONG", text, remedy)


def check_packages(needed: Iterable[Requirement], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Compare the installed versions, by name, with those ``needed``; all in range share one finding."""
    right: set[str] = set()
    wrong: set[str] = set()
    for requirement in needed:
        name, version = requirement.name, version_of(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            right.add(name)
        elif name not in wrong:
            wrong.add(name)
            because = f" ({REASONS[name]})" if name in REASONS else ""
            found = "missing" if version is None else f"{version}, outside {requirement.specifier}"
            yield Finding(name, "WRONG", found, f"pip install '{name}{requirement.specifier}'{because}")
    if right or wrong:
        yield Finding("required packages", "ok" if not wrong else "note", f"{len(right - wrong)} in range")
    else:
        yield Finding(PACKAGE, "WRONG", "not installed", "pip install . in its folder")


def check_torchvision(needed: Iterable[Requirement], torch_version: str | None) -> Finding:
    """Check the pair: each torchvision is built for one torch; with another, its operators do not exist."""
    pin = next((each for each in needed if each.name == "torch"), None)
    if pin is None or torch_version is None:
        return Finding("torch and torchvision", "note", "no pair to compare")
    if pin.specifier.contains(torch_version.partition("+")[0], prereleases=True):
        return Finding("torch and torchvision", "ok", f"a pair (torch {torch_version})")
    found = f"torchvision needs torch{pin.specifier}, found {torch_version}"
    remedy = f"pip install 'torch{pin.specifier}' (otherwise: operator torchvision::nms does not exist)"
    return Finding("torch and torchvision", "WRONG", found, remedy)


def check_registration(active: bool) -> Finding:
    """Whether ``import lavis`` alone makes this package's names known."""
    if active:
        return Finding("automatic registration", "ok", "import lavis knows this package's models")
    if os.environ.get(SWITCH) == "0":
        return Finding("automatic registration", "note", f"switched off by {SWITCH}=0")
    remedy = "pip install . (or -e .) puts lavis_xformer.pth beside the package; or call lavis_xformer.register()"
    return Finding("automatic registration", "WRONG", "lavis_xformer.pth is not active", remedy)


def check_folder(subject: str, folder: Path, remedy: str) -> Finding:
    """Whether a folder can be written, or made, and its disk has room."""
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # nothing in a locked one
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(subject, "WRONG", f"{folder} cannot be written", remedy)
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {free / (1 << 30):.1f} GiB free"
    return Finding(subject, "ok", found) if free > FREE_BYTES else Finding(subject, "WRONG", found, remedy)


def run_probe() -> tuple[list[str], str]:
    """Import everything in a separate process; return its output lines and the last line of its errors."""
    environment = {**os.environ, SWITCH: "0"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines, errors[-1] if done.returncode else ""


def check_imports(result: tuple[list[str], str]) -> Iterator[Finding]:
    """Read what :func:`run_probe` returned: whether all can be imported, and what GPU there is."""
    lines, error = result
    last = json.loads(lines[-1]) if lines else {"importing": "Python"}
    if error:
        remedy = "fix what is wrong above; if nothing is, in a clone: pip install -c constraints.txt ."
        yield Finding(f"import {last['importing']}", "WRONG", error, remedy)
        return
    yield Finding("imports", "ok", "all needed packages can be imported, and registering works")
    if last["gpu"] is None:
        yield Finding("GPU", "note", "none: runs use the CPU, in float32 or, where run.amp allows, bfloat16")
    elif not last["bf16"]:
        yield Finding("GPU", "note", f"{last['gpu']}, no bf16: mixed precision uses fp16")
    else:
        yield Finding("GPU", "ok", f"{last['gpu']}, with bf16")


def check_yaml(cfg_path: str, options: Sequence[str]) -> Iterator[Finding]:
    """Check a run's names, keys and files, as the run itself would, and the shipped files that it names."""
    from lavis_xformer import register
    from lavis_xformer.check import check_configuration
    from lavis_xformer.config.load import load_config
    from lavis_xformer.nested import nodes

    register()
    try:
        config = load_config(cfg_path, options)
        check_configuration(config)
    except UserError as error:
        yield Finding("YAML", "WRONG", str(error), "correct it, or override it with --options")
        return
    yield Finding("YAML", "ok", f"{cfg_path}: names, keys and paths")
    for key, value in nodes(config.config, leaves=True).items():
        if isinstance(value, str) and key.startswith("model."):
            yield from check_reference(key, value)


def check_reference(key: str, value: str) -> Iterator[Finding]:
    """Check a value of the model that names a file that ships with this package, or a model of the hub."""
    if value.startswith("assets://"):
        try:
            resolve(value)
        except (UserError, OSError) as error:
            yield Finding(key, "WRONG", str(error), "reinstall this package")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not os.path.exists(value):
        yield Finding(key, "note", f"{value}: downloaded from the hub unless it is in its cache")
