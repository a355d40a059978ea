"""Every YAML that ships is complete: it loads, and every name and key in it exists."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import lavis_xformer

ROOT = Path(__file__).parents[1]
COMPARISONS = sorted((ROOT / "projects").rglob("compare/*.yaml"))
PROJECTS = sorted({*(ROOT / "projects").rglob("*.yaml")} - {*COMPARISONS})
MODELS = sorted((ROOT / "configs" / "models").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """LAVIS knows our names."""
    lavis_xformer.register()


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_project_passes_the_checks_of_a_run(path: Path, tmp_path: Path) -> None:
    from lavis_xformer.config.load import load_config

    raw = OmegaConf.load(path)
    cfg = load_config(str(path), [f"run.output_dir={tmp_path}", *own_files(raw), *lavis_files(raw, tmp_path)])
    assert cfg.model_cfg.arch == raw.model.arch
    assert cfg.run_cfg.task == raw.run.task


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Load a run's configuration; each only once, as comparisons share runs."""
    from lavis_xformer.config.load import load_config

    raw, folder = cache(OmegaConf.load), tmp_path_factory.mktemp("files")

    @cache
    def load(config: str, options: tuple[str, ...]) -> Any:
        given = raw(ROOT / config)
        return load_config(config, [*options, *own_files(given), *lavis_files(given, folder)])

    return load


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_run_of_a_comparison_passes_the_checks_of_a_run(path: Path, checked: Any) -> None:
    from lavis_xformer.compare.plan import read_plan

    plan = read_plan(str(path))
    for cell in plan.cells(seeds=plan.seeds[:1]):
        arguments = cell.arguments()
        config, options = arguments[arguments.index("--cfg-path") + 1], arguments[arguments.index("--options") + 1 :]
        cfg = checked(config, tuple(options))
        assert cfg.run_cfg.seed == cell.seed
        assert cfg.model_cfg.get("pretrained") == cell.options.get("model.pretrained")
    chains = {name: tuple(str(cell.folder) for cell in plan.cells([name])) for name in plan.variants}
    assert len(set(chains.values())) == len(chains), "two variants are the same"


def own_files(raw: Any) -> list[str]:
    """Options that take away the files of a recipe for the user's own data."""
    return [
        f"datasets.{name}.splits.{split}.annotations=null"
        for name, dataset in raw.datasets.items()
        for split in (dataset or {}).get("splits", {})
        if "annotations" in ((dataset or {}).splits[split] or {})
    ]


def lavis_files(raw: Any, folder: Path) -> list[str]:
    """Options that put something where a recipe for LAVIS's own datasets expects the user's files."""
    (folder / "rows.json").write_text("[]")
    options = []
    for name, dataset in raw.datasets.items():
        info = (dataset or {}).get("build_info", {})
        if "images" in info:
            options.append(f"datasets.{name}.build_info.images.storage={folder}")
        for split, files in info.get("annotations", {}).items():
            if files is not None and "url" not in files:
                options.append(f"datasets.{name}.build_info.annotations.{split}.storage={folder}/rows.json")
    return options


@pytest.mark.parametrize("path", sorted(ROOT.glob("projects/**/*_blip2.yaml")), ids=lambda path: path.stem)
def test_a_blip2_twin_differs_in_the_model_alone(path: Path) -> None:
    twin, ours = OmegaConf.load(path), OmegaConf.load(path.with_name(path.name.replace("_blip2", "")))
    assert twin.datasets == ours.datasets
    assert twin.run == ours.run
    assert twin.model.fusion == "none"
    assert ours.model.get("fusion", "dual") == "dual"
    may_differ = {"fusion", "pretrained", "mae_image_size"}
    assert {key: twin.model[key] for key in set(twin.model) - may_differ} == {
        key: ours.model[key] for key in set(ours.model) - may_differ
    }


@pytest.mark.parametrize("path", sorted(ROOT.glob("projects/xformer/[te]*/*.yaml")), ids=lambda path: path.stem)
def test_the_command_in_a_yaml_starts_this_yaml(path: Path) -> None:
    commands = [line for line in path.read_text().splitlines() if re.match(r"#\s+(bash|python|torchrun) ", line)]
    assert commands or path.parent.name == "eval"
    assert all(str(path.relative_to(ROOT)) in line for line in commands)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_yaml_is_some_models_type_and_names_processors(path: Path) -> None:
    from lavis.common.registry import registry
    from lavis.models import load_preprocess

    cfg = OmegaConf.load(path)
    cls = registry.get_model_class(cfg.model.arch)
    assert Path(cls.default_config_path(cfg.model.model_type)) == path
    unread = set(cfg.model) - cls.CONFIG_KEYS - {"arch", "model_type", "load_finetuned", "finetuned", "pretrained"}
    assert not unread, "a key that no code reads misleads"
    vis, text = load_preprocess(cfg.preprocess)
    assert set(vis) == set(text) == {"train", "eval"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "datasets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_dataset_yaml_belongs_to_a_builder(path: Path) -> None:
    from lavis.common.registry import registry

    for name in OmegaConf.load(path).datasets:
        builder: Any = registry.get_builder_class(name)
        assert builder is not None, name
        assert any(Path(file) == path for file in builder.DATASET_CONFIG_DICT.values())
