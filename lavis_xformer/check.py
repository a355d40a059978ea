"""What can be known about a run before its model is built, most of it before its datasets are.

``python -m lavis_xformer.check`` checks many runs' configurations at once, as each run checks its own. Its input is a
JSON list of runs: a name, the YAML's path, the options, and whether it is evaluated rather than trained. The first
fault is printed with its run's name.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset
from lavis.tasks import CaptionTask, MultimodalClassificationTask, RetrievalTask, VQATask, setup_task
from omegaconf.errors import ConfigAttributeError

from lavis_xformer.config.keys import is_ours
from lavis_xformer.config.load import DEFAULT_RUNNER, load_config
from lavis_xformer.data.image_text_datasets import LocalFilesBuilder
from lavis_xformer.engine.options import RunOptions, check_lavis_keys
from lavis_xformer.engine.sampling import members
from lavis_xformer.errors import UserError
from lavis_xformer.launch import device_of
from lavis_xformer.models.generation import english
from lavis_xformer.models.parts import reads_mae
from lavis_xformer.paths import PARTS, checkpoints_of
from lavis_xformer.tasks.benchmark import BenchmarkTask

#: what tasks call to evaluate a model: LAVIS's, with ours derived from them, and our own
METHODS = {
    VQATask: "predict_answers",
    CaptionTask: "generate",
    RetrievalTask: "compute_sim_matrix",
    MultimodalClassificationTask: "predict",
    BenchmarkTask: "predict_answers",
}


def check(runs: Sequence[tuple[str, str, Sequence[str], bool]]) -> str:
    """Load runs' configurations, given as on standard input; return what is wrong with the first that has a fault.

    Files of weights and of own data must be there, unless an earlier run of the list is to write them.
    """
    made: set[Path] = set()
    for name, path, options, evaluated in runs:
        try:
            run = load_config(path, options)
            run.run_cfg.evaluate |= evaluated
            check_configuration(run, made)
        except UserError as error:
            return f"{name}: {error}"
        made.add(Path(run.run_cfg.output_dir) / str(run.run_cfg.get("job_id")))
    return ""


def check_configuration(config: Any, made: Collection[Path] = ()) -> None:
    """Check everything about a run that can be known before its model and datasets are built.

    Args:
        config: a ``RunConfig``, which an evaluation completes.
        made: folders in which earlier runs will have written checkpoints.

    Raises:
        UserError: a key, name or file is missing or wrong.
    """
    if config.run_cfg.evaluate:
        to_evaluate(config.run_cfg)
    check_run(config)
    check_weights(config.model_cfg, made)
    device_of(str(config.run_cfg.get("device", "auto")))


def check_run(config: Any) -> tuple[Any, RunOptions, Any]:
    """Check the ``run:`` section and the user's own data; return the runner's class and options and the task.

    The task may complete the section.

    Raises:
        UserError: a key or a file is missing, or a value is wrong.
    """
    check_lavis_keys(config.run_cfg)
    runner_class = runner_of(config.run_cfg)
    if runner_class is None:
        raise UserError(f"run.runner: LAVIS's own runners can't be started from here; set it to {DEFAULT_RUNNER}")
    options, task = RunOptions.from_config(config.run_cfg), task_of(config)
    if evaluates(config.run_cfg) and config.model_cfg.get("apply_lemmatizer") and "predict_answers" in called_by(task):
        english()
    for dataset, given in config.datasets_cfg.items():
        if issubclass(builder := registry.get_builder_class(dataset), LocalFilesBuilder):
            builder(given).given_splits()
    return runner_class, options, task


def evaluates(run: Mapping[str, Any]) -> bool:
    """Whether a run evaluates any split."""
    return bool(run.get("valid_splits") or run.get("test_splits"))


def called_by(task: Any) -> list[str]:
    """The :data:`METHODS` that a task calls to evaluate a model."""
    return [method for kind, method in METHODS.items() if isinstance(task, kind)]


def check_sizes(config: Any, datasets: Mapping[str, Collection[str]]) -> None:
    """Check that the image processors in use make images of the model's sizes, where the configuration has both.

    Args:
        config: a ``RunConfig``.
        datasets: the splits of each dataset.

    Raises:
        UserError: one does not.
    """
    model, run = config.model_cfg, config.run_cfg
    if not is_ours(registry.get_model_class(model.arch)):
        return
    wanted = {key: model.get(key) for key in ("image_size", *(["mae_image_size"] if reads_mae(model) else []))}
    used = {"train": [] if run.evaluate else ["train"]}
    used["eval"] = [*(run.get("valid_splits") or []), *(run.get("test_splits") or [])]
    for dataset, given in config.datasets_cfg.items():
        splits = datasets.get(dataset, ("train",))  # of one that was joined with others
        processors = given.get("vis_processor") or {}
        for mode in (mode for mode in processors if set(used.get(mode, ())) & set(splits)):
            for key, size in wanted.items():
                own = (processors[mode] or {}).get(key)
                if None not in (own, size) and own != size:
                    where = f"datasets.{dataset}.vis_processor.{mode}.{key}"
                    raise UserError(f"{where} is {own}, but model.{key} is {size}; set one to the other")


def check_answers(datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the answers from which LAVIS's VQAv2 and OK-VQA train: of a text, each letter would become an answer.

    Raises:
        UserError: those of a row are not a list of texts, or there are none.
    """
    trained = [(name, part) for name, splits in datasets.items() for part in members(splits.get("train"))]
    answers = [(name, part.annotation) for name, part in trained if isinstance(part, COCOVQADataset)]
    for name, rows in answers:
        for number, row in enumerate(rows, start=1):
            said = row.get("answer")
            if not (said and isinstance(said, list) and all(isinstance(each, str) for each in said)):
                raise UserError(f"datasets.{name}: train: row {number}: its answer is {said!r}; it must list texts")


def check_weights(model_cfg: Mapping[str, Any], made: Collection[Path] = ()) -> None:
    """Check that the local files and folders from which a model is built exist, or are still to be made.

    Args:
        model_cfg: the section ``model``.
        made: folders in which earlier runs will have written checkpoints.

    Raises:
        UserError: one does not exist.
    """
    if not is_ours(registry.get_model_class(model_cfg["arch"])):
        return  # LAVIS's own names need not be files
    names = {key: str(model_cfg.get(key) or "") for key in PARTS if key != "mae_model" or reads_mae(model_cfg)}
    local = {key: named for key, named in names.items() if named.count("/") > 1 or named.startswith((".", "/"))}
    for key, named in {**checkpoints_of(model_cfg), **local}.items():
        if "://" not in named and not Path(named).exists() and Path(named).parent not in made:
            raise UserError(f"model.{key}: there is no {named}")


def task_of(config: Any) -> Any:
    """Set up the configuration's task.

    Raises:
        UserError: a key that it needs is missing, or it is to evaluate a model that lacks the method it calls.
    """
    run = config.run_cfg
    try:
        task = setup_task(config)
    except ConfigAttributeError as error:
        raise UserError(f"{error.full_key}: missing; run.task {run.task} needs it") from error
    arch = config.model_cfg.arch
    for method in called_by(task) if evaluates(run) else ():
        if not hasattr(registry.get_model_class(arch), method):
            raise UserError(f"run.task: {run.task} needs a model with {method}(), which model.arch {arch} lacks")
    return task


def runner_of(run_cfg: Mapping[str, Any]) -> Any:
    """Return the class of ``run.runner``; None for LAVIS's own, which can't be started from here."""
    found = registry.get_runner_class(run_cfg.get("runner", DEFAULT_RUNNER))
    return None if found.__module__.startswith("lavis.") else found


def to_evaluate(run: Any) -> None:
    """Make the ``run:`` section one of an evaluation.

    Raises:
        UserError: no split is named.
    """
    run.evaluate = True
    if runner_of(run) is None:  # LAVIS's YAMLs name one of LAVIS's
        run.runner = DEFAULT_RUNNER
    run.test_splits, run.valid_splits = run.get("test_splits") or run.get("valid_splits"), []
    if not run.test_splits:
        raise UserError("run.test_splits names no split to evaluate; set it to [val] or [test]")


if __name__ == "__main__":
    logging.disable()  # what is on standard error is the fault
    if fault := check(json.load(sys.stdin)):
        sys.exit(fault)
