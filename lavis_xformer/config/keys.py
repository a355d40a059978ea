"""The keys of a configuration: which ones anything reads, and a clear line for the others."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_xformer.errors import UserError, nearest
from lavis_xformer.nested import nodes
from lavis_xformer.paths import run_keys_table

# Keys that LAVIS or this package reads but that need not appear in any YAML. A model, dataset builder, task,
# runner or schedule may add its own in a class attribute CONFIG_KEYS.
RUN_KEYS = frozenset(
    "accum_grad_iters amp batch_size_eval batch_size_train beta2 device dist_backend dist_url distributed evaluate "
    "gpu init_lr iters_per_inner_epoch log_freq lr_sched max_epoch max_iters min_lr num_workers output_dir rank "
    "resume_ckpt_path runner seed task test_splits train_dataset_ratios train_splits use_dist_eval_sampler "
    "valid_splits warmup_lr warmup_steps weight_decay world_size".split()
)
LAVIS_KEYS = {  # of LAVIS's own classes, by role
    "task": frozenset(
        "inference_method k_test max_len min_len num_ans_candidates num_beams prompt report_metric".split()
    ),
    "lr_sched": frozenset({"lr_decay_rate"}),
}
WORDS_TOO = ("run.amp", "run.resume")  # True or False, or a word
MODEL_KEYS = frozenset("arch model_type load_finetuned load_pretrained finetuned pretrained".split())
DATASET_KEYS = frozenset(
    "type data_type build_info.annotations.*.url build_info.annotations.*.storage build_info.images.storage "
    "build_info.videos.storage build_info.features.storage".split()
)
PROCESSOR_KEYS = frozenset(
    "name image_size mean std min_scale max_scale n_frms prompt max_words max_turns use_caption visual_ft "
    "audio_ft mae_image_size mae_mean mae_std hflip".split()
)


def check_keys(project: DictConfig, chosen: DictConfig, defaults: DictConfig, classes: dict[str, Any]) -> None:
    """Reject keys that nothing reads.

    In ``--options``, everywhere except in the model section of a class without ``CONFIG_KEYS``, such as LAVIS's
    own. In the YAML, only in the sections that belong to classes of this package: ``run`` to the runner.

    Args:
        project: the user's YAML.
        chosen: ``--options``.
        defaults: the default YAMLs of the model and the datasets.
        classes: the registered classes by role: model, task, runner, lr_sched, datasets.X.

    Raises:
        UserError: a key is unknown, or has text where the default is a number.
    """
    allowed = _optional_keys(classes)
    exist = set(nodes(defaults))
    ours = [section for section, cls in classes.items() if is_ours(cls)]
    if "runner" in ours:
        ours.append("run")
    for key in nodes(project, leaves=True):
        if any(key.startswith(f"{section}.") for section in ours):
            _check_key("", key, exist, allowed, classes["task"])
    usual = nodes(OmegaConf.merge(defaults, project))
    for key, value in nodes(chosen, leaves=True).items():
        _check_key("--options ", key, set(usual), allowed, classes["task"])
        is_text = isinstance(value, str) and not value.startswith("${")
        if isinstance(usual.get(key), (int, float)) and is_text and key not in WORDS_TOO:
            raise UserError(f"--options {key}={value}: expected a value like {usual[key]}")


def is_ours(cls: Any) -> bool:
    """Whether a class is of this package, or derived from one."""
    return any(base.__module__.startswith("lavis_xformer.") for base in cls.__mro__)


def _check_key(source: str, key: str, exist: set[str], allowed: Iterable[str], task: Any) -> None:
    if key in exist or any(fnmatchcase(key, pattern) for pattern in allowed):
        return
    section, _, name = key.rpartition(".")
    tasks = registry.mapping["task_name_mapping"]
    readers = sorted(other for other, cls in tasks.items() if name in getattr(cls, "CONFIG_KEYS", ()))
    if section == "run" and readers:
        own = next(other for other, cls in tasks.items() if cls is task)
        others = f"task {readers[0]} does" if len(readers) == 1 else f"tasks {', '.join(readers)} do"
        raise UserError(f"{source}{key}: task {own} does not read {name}; {others}")
    siblings = {path for path in exist.union(allowed) if path.rpartition(".")[0] == section}
    known = nearest(key, siblings or exist)
    more = f" (see {run_keys_table()})" if section == "run" else ""
    raise UserError(f"{source}{key}: no configuration knows this key: {known}{more}")


def _optional_keys(classes: dict[str, Any]) -> list[str]:
    """Patterns of the keys that may be set though no YAML names them."""

    def _own(*names: str) -> frozenset[str]:
        return frozenset().union(*(getattr(classes.get(name), "CONFIG_KEYS", ()) for name in names))

    keys = {"run": RUN_KEYS | _own("runner", "task", "lr_sched"), "model": MODEL_KEYS | _own("model")}
    for role, names in LAVIS_KEYS.items():
        if role in classes and not is_ours(classes[role]):
            keys["run"] |= names
    if not _own("model"):
        keys["model"] = frozenset("*")
    for section in classes:
        if section.startswith("datasets."):
            keys[section] = DATASET_KEYS | {f"*_processor.*.{key}" for key in PROCESSOR_KEYS} | _own(section)
    return [f"{section}.{key}{rest}" for section, names in keys.items() for key in names for rest in ("", ".*")]
