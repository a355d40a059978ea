"""The keys that ``xformer_runner`` adds to the ``run:`` section of a LAVIS YAML."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from lavis_xformer.errors import UserError, number, one_of, switch, text, whole
from lavis_xformer.paths import run_keys_table

AMP_MODES = {"False": "no", "no": "no", "True": "fp16", "fp16": "fp16", "bf16": "bf16", "auto": "auto"}
RESUME_MODES = {"False": "no", "no": "no", "auto": "auto"}
NEEDED = ("num_workers", "batch_size_eval")
NEEDED_TO_TRAIN = ("batch_size_train", "lr_sched", "init_lr", "min_lr", "weight_decay", "max_epoch")
#: LAVIS's own numbers: their type and the smallest sensible value
NUMBERS: dict[str, tuple[type, float]] = {
    **dict.fromkeys(("batch_size_train", "batch_size_eval", "accum_grad_iters", "max_epoch", "max_iters"), (int, 1)),
    **dict.fromkeys(("num_workers", "warmup_steps", "log_freq", "min_len"), (int, 0)),
    **dict.fromkeys(("num_beams", "max_len", "max_answer_len", "k_test", "num_ans_candidates"), (int, 1)),
    **dict.fromkeys(("init_lr", "min_lr", "weight_decay", "beta2", "lr_decay_rate"), (float, 0)),
    "warmup_lr": (float, -1),  # LAVIS's value for "not set"
}
SWITCHES = ("evaluate", "use_dist_eval_sampler", "report_metric", "blind")
LISTS = ("train_splits", "valid_splits", "test_splits", "train_dataset_ratios")
ON_CORRUPT = {"": "", "skip": "skip", "raise": "raise"}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Typed and checked values of the runner's own keys; LAVIS's keys are read by ``RunnerBase``.

    docs/engine.md explains each of them in full.
    """

    amp: str = "no"  # bf16; fp16 (True, as in LAVIS; on a GPU only); no; auto: bf16 where the hardware has it natively
    muon: float = 0.0  # Muon for matrices other than embeddings, at this times the learning rate; 0: AdamW for all
    max_grad_norm: float = 0.0  # 2-norm to clip to; 0: no clipping
    skip_nonfinite: int = 0  # non-finite steps that may be skipped in the whole run; one more stops it
    save_every_steps: int = 0  # optimiser steps; 0: save after epochs only
    save_every_minutes: float = 0.0  # since the last save; 0: never
    keep_last: int = 3  # checkpoints to keep besides the best; 0: all
    resume: str = "no"  # auto: resume the newest run of the same configuration
    job_id: str = ""  # name of the run folder; empty: the start time
    seed: int = 42  # for the weights, the data order and all augmentation
    tensorboard: bool = True
    wandb: bool = False
    on_corrupt: str = ""  # skip or raise; empty: training skips; evaluation raises (a replacement would count twice)
    iters_per_epoch: int = 0  # batches per process; 0: as many as one pass over the data fills
    loader_timeout: float = 0.0  # seconds to wait for a batch before a data worker is taken for dead; 0: wait forever
    next_command: str = ""  # command to suggest at the end; {checkpoint} stands for the best one's path

    @classmethod
    def from_config(cls, run_cfg: Mapping[str, Any]) -> RunOptions:
        """Read the keys of the ``run:`` section.

        Raises:
            UserError: a value is of the wrong type, negative, or not among the choices.
        """
        given = {f.name: run_cfg.get(f.name) for f in fields(cls)}
        if given["iters_per_epoch"] is None:
            given["iters_per_epoch"] = run_cfg.get("iters_per_inner_epoch", run_cfg.get("max_iters"))
        elif given["iters_per_epoch"] and run_cfg.get("max_iters"):
            raise UserError("run.max_iters goes with run.iters_per_inner_epoch; with run.iters_per_epoch set max_epoch")
        defaults = cls()
        values: dict[str, Any] = {
            name: _checked(name, value, type(getattr(defaults, name)))
            for name, value in given.items()
            if value is not None
        }
        if "/" in (job := values.get("job_id", "")) or job in (".", ".."):
            raise UserError(f"run.job_id is {job!r}; it names a folder in run.output_dir: no '/', '.' or '..'")
        if values.get("seed", 0) >= 2**32:
            raise UserError(f"run.seed is {values['seed']}; it must be less than 2**32, as numpy wants it")
        return cls(**values)


def check_lavis_keys(run_cfg: MutableMapping[str, Any]) -> None:
    """Reject a ``run:`` section in which a LAVIS key without a default is missing, or one has an invalid value.

    Whole numbers become integers, as LAVIS needs them.

    Raises:
        UserError: keys are missing, a number is invalid or too small, a switch is neither True nor False, or splits or
            ratios are not a list.
    """
    needed = NEEDED if run_cfg.get("evaluate") else (*NEEDED, *NEEDED_TO_TRAIN)
    given = {name for name in needed if run_cfg.get(name) is not None}
    if run_cfg.get("max_iters"):  # LAVIS's runner_iter takes it in place of max_epoch
        given.add("max_epoch")
    missing = [f"run.{name}" for name in needed if name not in given]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing, and there is no default; see {run_keys_table()}")
    for name, (kind, least) in NUMBERS.items():
        if run_cfg.get(name) is not None:
            checked = _number(name, run_cfg[name], kind, least=least)
            run_cfg[name] = checked if kind is int else run_cfg[name]
    if float(run_cfg.get("beta2") or 0) >= 1:
        raise UserError(f"run.beta2 is {run_cfg['beta2']!r}; it must be less than 1")
    for name in SWITCHES:
        switch(f"run.{name}", run_cfg.get(name, False))
    for name in LISTS:
        if isinstance(run_cfg.get(name), (str, int, float)):
            raise UserError(f"run.{name} is {run_cfg[name]!r}; it must be a list: [{run_cfg[name]}]")


def check_splits(run_cfg: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Reject splits of ``run:`` that the datasets lack or that can't be used so.

    Args:
        run_cfg: the ``run:`` section.
        datasets: every dataset's splits, by name.

    Raises:
        UserError: a split does not exist, or is both trained on and evaluated; or several datasets share one to
            evaluate.
    """
    trained = [] if run_cfg.get("evaluate") else list(run_cfg.get("train_splits") or [])
    if trained != ["train"] and not run_cfg.get("evaluate"):
        raise UserError(f"run.train_splits is {trained}; to train, it must be [train]")
    owners: dict[str, list[str]] = {}
    for name, splits in datasets.items():
        for split in splits:
            owners.setdefault(split, []).append(name)
    for split in trained:
        one_of("run.train_splits", split, owners)
    for key in ("valid_splits", "test_splits"):
        for split in run_cfg.get(key) or []:
            one_of(f"run.{key}", split, owners)
            if split in trained:
                raise UserError(
                    f"run.{key}: '{split}' is trained on, augmented and in part; to score it, evaluate a "
                    f"checkpoint by python -m lavis.evaluate with run.{key}=[{split}]"
                )
    for split, names in owners.items():
        if split != "train" and len(names) > 1:
            raise UserError(
                f"{' and '.join(names)} each have a split '{split}', but only one may; leave out the others: "
                f"--options datasets.{names[-1]}.build_info.annotations.{split}=null for LAVIS's own datasets, "
                f"splits.{split}.annotations=null for your own files, splits.{split}.scenes=0 for scenes"
            )


def _checked(name: str, value: object, kind: type) -> object:
    choices = {"amp": AMP_MODES, "resume": RESUME_MODES, "on_corrupt": ON_CORRUPT}.get(name)
    if choices is not None:
        if str(value) not in choices:
            raise UserError(f"run.{name} is {value!r}; it must be one of {', '.join(filter(None, choices))}")
        return choices[str(value)]
    if kind is str:
        return text(f"run.{name}", value)
    if kind is bool:
        return bool(switch(f"run.{name}", value))
    return _number(name, value, kind, least=0)


def _number(name: str, value: Any, kind: type, *, least: float) -> float:
    if kind is int:
        value = int(value) if isinstance(value, float) and value.is_integer() else value  # as YAML reads 1e3
        return whole(f"run.{name}", value, least=int(least))
    if (converted := number(f"run.{name}", value)) < least:
        raise UserError(f"run.{name} is {value!r}; it must be at least {least}")
    return converted
