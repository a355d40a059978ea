"""A run's configuration: LAVIS's, checked before anything heavy is built.

The layers, later ones override earlier ones: the default YAML of the model's type, those of the datasets, the
project's YAML, ``--options``. Beyond LAVIS's ``Config``:

- names (arch, type, dataset, task, runner, schedule, processor, and those in ``model``, such as fusion), keys and
  files are checked, and a :class:`UserError` names the key that is wrong;
- ``model.model_type`` and ``datasets.X.type`` given by ``--options`` load the default YAML of that type; an exported
  folder as ``model.model_type`` brings its weights too;
- ``datasets: {X: }`` takes all of X's defaults; ``--options datasets.X=null`` leaves a dataset out, and
  ``datasets.X.build_info.annotations.test=null`` a split;
- a relative ``run.output_dir`` is relative to the current folder, never to site-packages.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_xformer.config.files import check_data_files, check_file
from lavis_xformer.config.keys import check_keys, is_ours
from lavis_xformer.errors import UserError, fault_in_yaml, first_line, nearest, one_of, text
from lavis_xformer.models.checkpoints import check_loading
from lavis_xformer.models.parts import check_values, weights_of
from lavis_xformer.nested import nodes
from lavis_xformer.paths import PARTS, project_path

logger = logging.getLogger(__name__)

SECTIONS = ("model", "datasets", "run")
DEFAULT_RUNNER = "xformer_runner"
PATHS = {
    "run": ("resume_ckpt_path", "caption_truths", "question_types"),
    "model": ("pretrained", "finetuned", "blip2_pretrained", *PARTS),
}


def load_config(cfg_path: str, options: Sequence[str] | None = None) -> RunConfig:
    """Read and check a run's configuration: a YAML, the user's or one of the shipped ``projects/``, and ``--options``.

    Raises:
        UserError: a file, key, name or value is wrong; the message says which, and what would be right.
    """
    try:
        return RunConfig(project_path(cfg_path), options or ())
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{cfg_path}: {where}{first_line(error)}") from error


class RunConfig(Config):
    """LAVIS's ``Config`` with its merging replaced and its interface kept."""

    def __init__(self, cfg_path: Path, options: Sequence[str]) -> None:
        """Merge the layers, then check keys, names and files, in this order."""
        project, chosen = read_yaml(cfg_path), parse_options(options)
        _check_sections(project, chosen)
        _unset(project, chosen)
        user = _merge(project, chosen)
        _drop_and_fill_datasets(project, chosen, user)
        defaults, classes = _defaults(user)
        _check_sections(defaults, user)
        _load_from_folder(chosen, user, classes["model"])
        check_keys(project, chosen, defaults, classes)
        self.config = _merge(defaults, user)
        _drop_null(self.config.run)
        self.config.run.setdefault("evaluate", False)  # which LAVIS's captioning reads
        for dataset in self.config.datasets.values():
            _drop_null((dataset.get("build_info") or {}).get("annotations") or {})
        output = self.config.run.get("output_dir") or "output"
        output = text("run.output_dir", str(output) if isinstance(output, (int, float)) else output)
        self.config.run.output_dir = str(Path(output).expanduser().absolute())
        _expand_home(self.config)
        if is_ours(classes["model"]):
            check_values(self.config.model)
            check_loading(self.config.model)
            weights_of(self.config.model.get("loss_weights"), getattr(classes["model"], "LOSS_WEIGHTS", {}))
        _check_processors(self.config)
        check_data_files(self.config.datasets, user.datasets)
        check_file("run.resume_ckpt_path", self.config.run.get("resume_ckpt_path"))
        self.to_dict()  # finds what can't be resolved
        registry.register("configuration", self)

    def to_dict(self) -> Any:
        """The values that the run uses, interpolations resolved: a resumed run is compared with them."""
        return OmegaConf.to_container(self.config, resolve=True)


def choose_model_type(arch: str, model_type: str | None) -> str:
    """Return ``model_type`` if ``arch`` has it, or it is a folder; if it is None, the documented default of ``arch``.

    Raises:
        UserError: LAVIS knows no such model or type, or there is no default.
    """
    cls = find("model", arch, "model")
    types = list(cls.PRETRAINED_MODEL_CONFIG_DICT)
    if model_type is None:
        model_type = getattr(cls, "DEFAULT_MODEL_TYPE", types[0] if len(types) == 1 else None)
        if model_type is None:
            raise UserError(f"{arch} has no default model type: name one of {', '.join(types)}")
        logger.info("%s: no model type given, using '%s'", arch, model_type)
    if model_type in types:
        return model_type
    folder = Path(os.path.expanduser(model_type))  # unlike pathlib's, it takes a user that doesn't exist
    if not (folder / "config.yaml").is_file():  # as an exported folder has
        raise UserError(f"{arch} has no model type '{model_type}': {nearest(model_type, types)}")
    return str(folder.absolute())  # never the name of a type


def find(kind: str, name: Any, key: str) -> Any:
    """Look up a class in LAVIS's registry.

    Args:
        kind: ``model``, ``builder``, ``task``, ``runner``, ``lr_scheduler`` or ``processor``.
        name: its registered name.
        key: where the user wrote the name, for the message.

    Raises:
        UserError: no class has that name.
    """
    known = registry.mapping[f"{kind}_name_mapping"]
    if not isinstance(name, str) or name not in known:
        noun = "dataset" if kind == "builder" else kind.replace("_", " ")
        said = f"the {noun} is missing" if name is None else f"there is no {noun} '{name}'"
        raise UserError(f"{key}: {said}: {nearest(str(name), known)}")
    return known[name]


def read_yaml(path: Path) -> DictConfig:
    """Read a project's YAML: the sections ``model``, ``datasets`` and ``run``.

    Raises:
        UserError: it is not YAML (the line is named), not of this form, or lacks a section.
    """
    try:
        config = OmegaConf.load(path)
    except yaml.YAMLError as error:
        where, problem = fault_in_yaml(error)
        raise UserError(f"{path}{where}: not YAML: {problem}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for section in SECTIONS:
        if not isinstance(config, DictConfig) or not isinstance(config.get(section), DictConfig):
            raise UserError(f"{path}: the section '{section}:' is missing or holds no keys")
    _check_top_level(path, cast(DictConfig, config))
    return cast(DictConfig, config)


def _check_top_level(path: Path, config: DictConfig) -> None:
    """Reject a key beside the sections that nothing refers to, such as one of ``run`` that has slipped out of it."""
    text = path.read_text(encoding="utf-8")
    for key in map(str, config):
        referred = f"${{{key}" in text or re.search(rf"^{re.escape(key)}:\s*&", text, re.MULTILINE)
        if key not in (*SECTIONS, "preprocess") and not referred:
            raise UserError(
                f"{path}: '{key}:' stands beside the sections {', '.join(SECTIONS)}, where nothing reads it; "
                "indent it below one of them"
            )


def parse_options(options: Sequence[str]) -> DictConfig:
    """Read ``--options``: ``key=value`` strings, or alternating keys and values.

    Raises:
        UserError: the options have neither form, or a value is not YAML.
    """
    if options and "=" not in options[0] and len(options) % 2 == 0:
        options = [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or not key or key.partition(".")[0] not in SECTIONS or "." not in key:
            raise UserError(
                f"--options {option}: expected section.key=value, such as run.max_epoch=3, "
                f"with one of the sections {', '.join(SECTIONS)}"
            )
    chosen = OmegaConf.create()
    for option in options:
        key, _, value = option.partition("=")
        try:
            chosen.merge_with_dotlist([option])
        except yaml.YAMLError as error:
            raise UserError(
                f"--options {option}: the value is not YAML; text is quoted: \"{key}='{value}'\""
            ) from error
        if key == "run.job_id" and isinstance(chosen.run.job_id, (int, float)):
            chosen.run.job_id = value  # YAML reads 20250101_120000 as a number
    return chosen


def _merge(*layers: Any) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(*layers))


def _unset(project: DictConfig, chosen: DictConfig) -> None:
    """Take the keys of the YAML's ``run`` away that are null in ``--options``, whatever they are to its task."""
    for key in [key for key, value in nodes(chosen.get("run") or {}).items() if value is None and key in project.run]:
        del project.run[key], chosen.run[key]


def _drop_and_fill_datasets(project: DictConfig, chosen: DictConfig, user: DictConfig) -> None:
    """Interpret a null dataset: in a YAML it takes all defaults, in ``--options`` it is left out."""
    for name in list(user.datasets):
        if name in chosen.get("datasets", {}) and chosen.datasets[name] is None:
            del user.datasets[name], chosen.datasets[name]
            project.datasets.pop(name, None)
        elif user.datasets[name] is None:
            user.datasets[name] = project.datasets[name] = {}
        elif not isinstance(user.datasets[name], DictConfig):
            raise UserError(f"datasets.{name} is {user.datasets[name]!r}; it must hold keys, or be empty")
    if not user.datasets:
        raise UserError("datasets: at least one dataset must be named")


def _defaults(user: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """Find every registered class that the user names, and the default YAMLs of model and datasets."""
    run, arch = user.run, user.model.get("arch")
    classes = {"model": find("model", arch, "model.arch"), "task": find("task", run.get("task"), "run.task")}
    classes["runner"] = find("runner", run.get("runner", DEFAULT_RUNNER), "run.runner")
    if run.get("lr_sched") is not None:
        classes["lr_sched"] = find("lr_scheduler", run.lr_sched, "run.lr_sched")
    given = user.model.get("model_type")
    user.model.model_type = choose_model_type(arch, None if given is None else str(given))
    layers = [_model_defaults(classes["model"], user.model.model_type)]
    for name, config in user.datasets.items():
        cls = classes[f"datasets.{name}"] = find("builder", name, "datasets")
        kind = one_of(f"datasets.{name}.type", config.get("type", "default"), cls.DATASET_CONFIG_DICT)
        layers.append(OmegaConf.load(cls.default_config_path(kind)))
    return _merge(OmegaConf.create({"run": {}}), *layers), classes


def _check_sections(lower: DictConfig, upper: DictConfig) -> None:
    """Reject a plain value or a list where the lower layer has keys, such as a processor's name; and the reverse."""
    given = nodes(lower)
    sections = {key: value for key, value in given.items() if isinstance(value, Mapping)}
    for key, value in nodes(upper).items():
        if isinstance(value, Mapping) and isinstance(given.get(key), (list, ListConfig)):
            raise UserError(f"{key} is {value!r}; it must be a list, given as a whole: {key}={list(given[key])}")
        if key in sections and value is not None and not isinstance(value, Mapping):
            raise UserError(f"{key} is {value!r}; it must hold keys such as {', '.join(map(str, sections[key]))}")


def _model_defaults(cls: Any, model_type: str) -> Any:
    """The default YAML of a model's type; our own classes know exported folders too."""
    if hasattr(cls, "default_config"):
        return cls.default_config(model_type)
    return OmegaConf.load(cls.default_config_path(model_type))


def _load_from_folder(chosen: DictConfig, user: DictConfig, cls: Any) -> None:
    """Load the weights of an exported folder in ``--options``, whatever ``pretrained`` the YAML has.

    Null for ``pretrained`` in ``--options`` means the folder's weights too; ``load_pretrained: False`` loads none.
    """
    model: Any = chosen.get("model", {})
    if model.get("model_type") not in (None, *cls.PRETRAINED_MODEL_CONFIG_DICT) and not model.get("pretrained"):
        user.model.pretrained = user.model.model_type


def _drop_null(section: Any) -> None:
    """Remove null entries: a split that is left out, a key of ``run`` that counts as not set."""
    for key in [key for key in section if not OmegaConf.is_interpolation(section, key) and section[key] is None]:
        del section[key]


def _expand_home(config: DictConfig) -> None:
    """Replace ``~`` in the paths of checkpoints, parts and files, as the shell does for those that stand alone."""
    for section, keys in PATHS.items():
        for key in keys:
            if str(value := config[section].get(key)).startswith("~"):
                config[section][key] = str(Path(value).expanduser())


def _check_processors(config: DictConfig) -> None:
    for dataset, values in config.datasets.items():
        for kind in ("vis_processor", "text_processor"):
            for mode, processor in (values.get(kind) or {}).items():
                key = f"datasets.{dataset}.{kind}.{mode}"
                if processor is None:
                    continue
                if not isinstance(processor, DictConfig):
                    raise UserError(f"{key} is {processor!r}; it must hold keys such as name")
                find("processor", processor.get("name"), f"{key}.name")
