"""LAVIS's runner without its assumptions: runs on CPU or GPU, with or without a process group.

A *step* is an optimiser step: ``accum_grad_iters`` batches of every process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from lavis_xformer import launch
from lavis_xformer.data.guard import GuardedDataset, guard, guards_in
from lavis_xformer.distributed import world_size
from lavis_xformer.engine.options import RunOptions
from lavis_xformer.engine.sampling import eval_loader, train_loader
from lavis_xformer.errors import UserError


class PortableRunner(RunnerBase):
    """Builds device, model, scaler, schedule and loaders on demand, as ``RunnerBase`` does."""

    CONFIG_KEYS = frozenset(field.name for field in fields(RunOptions))

    # What ``RunnerBase.__init__`` sets to None, for the properties below to fill.
    _device: torch.device | None
    _model: Any
    _wrapped_model: Any
    _scaler: torch.amp.GradScaler | None
    _lr_sched: Any

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: dict[str, Any], job_id: str) -> None:
        """Take what LAVIS's runners take; makes the output folder.

        Raises:
            UserError: a key of ``run:`` has a value that it can't have.
        """
        self.options = RunOptions.from_config(cfg.run_cfg)
        self.guards: list[GuardedDataset] = []
        super().__init__(cfg, task, model, datasets, job_id)

    @property
    def device(self) -> torch.device:
        """This process's device; ``run.device`` may be ``auto``."""
        if self._device is None:
            kind = launch.device_of(str(self.config.run_cfg.get("device", "auto")))
            index = torch.cuda.current_device() if kind == "cuda" else None
            self._device = torch.device(kind) if index is None else torch.device(kind, index)
        return self._device

    @property
    def use_distributed(self) -> bool:
        """Whether several processes train together."""
        return world_size() > 1

    @property
    def evaluate_only(self) -> bool:
        """Whether to skip the training (``run.evaluate``)."""
        return bool(self.config.run_cfg.get("evaluate", False))

    @property
    def model(self) -> nn.Module:
        """The model on its device, wrapped for gradient averaging where several processes train."""
        if self._wrapped_model is None:
            if self.device.type == "cpu":
                _halves_to_float(self._model)
            self._wrapped_model = self._model = self._model.to(self.device)
            if self.use_distributed:
                devices = [self.device] if self.device.type == "cuda" else None
                self._wrapped_model = DistributedDataParallel(self._model, device_ids=devices, broadcast_buffers=False)
        return self._wrapped_model

    @property
    def amp(self) -> str:
        """Mixed precision in use: none on CPU."""
        return self.options.amp if self.device.type == "cuda" else "no"

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of fp16's gradients; bf16 and fp32 need none."""
        if self._scaler is None and self.amp == "fp16":
            self._scaler = torch.amp.GradScaler("cuda")
        return self._scaler

    @property
    def batches_per_epoch(self) -> int:
        """Batches of each process in an epoch."""
        return len(self.train_loader)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last may be of fewer batches."""
        return math.ceil(self.batches_per_epoch / self.accum_grad_iters)

    @property
    def lr_scheduler(self) -> Any:
        """LAVIS's schedule of ``run.lr_sched``, or ours; both are stepped by optimiser step."""
        if self._lr_sched is None:
            run = self.config.run_cfg
            self._lr_sched = registry.get_lr_scheduler_class(run.lr_sched)(
                optimizer=self.optimizer,
                max_epoch=self.max_epoch,
                min_lr=self.min_lr,
                init_lr=self.init_lr,
                decay_rate=run.get("lr_decay_rate", None),
                warmup_start_lr=float(run.get("warmup_lr", -1)),
                warmup_steps=int(run.get("warmup_steps", 0)),
                steps_per_epoch=self.steps_per_epoch,
            )
        return self._lr_sched

    def setup_output_dir(self) -> None:
        """Make ``run.output_dir``/job id, relative to the current folder, and tell LAVIS's registry."""
        self.output_dir = Path(self.config.run_cfg.output_dir).absolute() / self.job_id
        self.result_dir = self.output_dir / "result"
        try:
            self.result_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.output_dir: {self.output_dir} can't be made: {error}") from error
        paths = registry.mapping["paths"]
        paths["output_dir"], paths["result_dir"] = str(self.output_dir), str(self.result_dir)

    def create_loaders(
        self,
        datasets: Sequence[Any],
        num_workers: int,
        batch_sizes: Sequence[int],
        is_trains: Sequence[bool],
        collate_fns: Sequence[Any],
        dataset_ratios: Sequence[float] | None = None,
    ) -> list[DataLoader[Any]]:
        """Make one loader for each split, of map-style datasets.

        Training drops the last samples of an epoch that fill no batch on every process. Samples that
        can't be read are skipped or fatal, as ``run.on_corrupt`` says. ``dataset_ratios`` (LAVIS's
        ``run.train_dataset_ratios``) are shares of an epoch, see ``engine.sampling.Mixture``.

        Raises:
            UserError: a training batch is larger than its dataset, or a dataset is of shards.
        """
        common: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": self.device.type == "cuda",
            "timeout": self.options.loader_timeout if num_workers else 0,
        }
        share_eval = self.use_distributed and self.use_dist_eval_sampler
        loaders = []
        for dataset, size, is_train, collate in zip(datasets, batch_sizes, is_trains, collate_fns, strict=True):
            if isinstance(dataset, (tuple, IterableDataset)):
                raise UserError("xformer_runner reads map-style datasets, not streams of shards")
            batch = {"batch_size": int(size), "collate_fn": collate, **common}
            dataset = guard(dataset, on_corrupt=self.options.on_corrupt or ("skip" if is_train else "raise"))
            self.guards += guards_in(dataset)
            if is_train:
                loaders.append(train_loader(dataset, seed=self.options.seed, ratios=dataset_ratios, **batch))
            else:
                loaders.append(eval_loader(dataset, share=share_eval, **batch))
        return loaders

    def corrupt(self) -> list[str]:
        """Name the samples skipped so far by this process and the workers of its loaders."""
        return [name for dataset in self.guards for name in dataset.corrupt()]


def _halves_to_float(model: nn.Module) -> None:
    """Make fp16 weights fp32, since a CPU computes little in fp16."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
