"""LAVIS's runner made portable: runs on CPU or GPU, with or without a process group.

A *step* is an optimiser step: ``accum_grad_iters`` batches on every process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split
from lavis.runners.runner_base import RunnerBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from lavis_xformer import launch
from lavis_xformer.data.guard import GuardedDataset, StreamGuard, guard, guards_in
from lavis_xformer.distributed import world_size
from lavis_xformer.engine import rng
from lavis_xformer.engine.optimizers import MuonAdamW
from lavis_xformer.engine.options import RunOptions
from lavis_xformer.engine.sampling import check_ratios, eval_loader, members, split_by, train_loader
from lavis_xformer.engine.step import AUTOCAST, computes_bf16
from lavis_xformer.engine.streams import EpochLoader, JoinedLoader, ShardStream, StreamLoader
from lavis_xformer.errors import UserError
from lavis_xformer.files import make_folder


class PortableRunner(RunnerBase):
    """Builds device, model, scaler, schedule and loaders on demand, as ``RunnerBase`` does."""

    CONFIG_KEYS = frozenset(field.name for field in fields(RunOptions))

    # ``RunnerBase.__init__`` sets these to None; the properties below fill them.
    _device: torch.device | None
    _model: Any
    _wrapped_model: Any
    _optimizer: torch.optim.Optimizer | None
    _scaler: torch.amp.GradScaler | None
    _lr_sched: Any
    _dataloaders: dict[str, Any] | None
    datasets: dict[str, Any]

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: dict[str, Any], job_id: str) -> None:
        """Take what LAVIS's runners take, and create the output folder.

        Raises:
            UserError: a key of ``run:`` has an invalid value.
        """
        self.options = RunOptions.from_config(cfg.run_cfg)
        self.guards: list[GuardedDataset | StreamGuard] = []
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
                self._wrapped_model = DistributedDataParallel(
                    self._model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        return self._wrapped_model

    @property
    def amp(self) -> str:
        """Mixed precision in use; a CPU has no fp16."""
        if self.options.amp == "auto":
            return "bf16" if computes_bf16(self.device) else "no"
        return "no" if self.options.amp == "fp16" and self.device.type == "cpu" else self.options.amp

    @property
    def eval_dtype(self) -> torch.dtype | None:
        """Autocast's dtype in evaluation: on a GPU the training's, since a trained encoder would be slow in fp32."""
        return AUTOCAST.get(self.amp) if self.device.type == "cuda" else None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS's AdamW, or Muon and AdamW where ``run.muon`` is set."""
        run = self.config.run_cfg
        if self._optimizer is None and self.options.muon:
            self._optimizer = MuonAdamW(
                self.model,
                lr=float(run.init_lr),
                weight_decay=float(run.weight_decay),
                betas=(0.9, float(run.get("beta2", 0.999))),
                pace=self.options.muon,
            )
        return super().optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler for fp16; bf16 and fp32 need none."""
        if self._scaler is None and self.amp == "fp16":
            self._scaler = torch.amp.GradScaler("cuda")
        return self._scaler

    @property
    def max_epoch(self) -> int:
        """``run.max_epoch``; if ``run.max_iters`` is set, as for LAVIS's ``runner_iter``, the epochs that it fills."""
        most = self.config.run_cfg.get("max_iters")
        return math.ceil(int(most) / self.batches_per_epoch) if most else int(self.config.run_cfg.max_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of each process in an epoch."""
        return len(self.train_loader)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last may have fewer batches."""
        return math.ceil(self.batches_per_epoch / self.accum_grad_iters)

    @property
    def lr_scheduler(self) -> Any:
        """The schedule that ``run.lr_sched`` names, LAVIS's or ours; both are stepped by optimiser step."""
        if self._lr_sched is None:
            run = self.config.run_cfg
            self._lr_sched = registry.get_lr_scheduler_class(run.lr_sched)(
                optimizer=self.optimizer,
                max_epoch=self.max_epoch,
                min_lr=self.min_lr,
                init_lr=self.init_lr,
                decay_rate=float(run.get("lr_decay_rate", 1)),
                warmup_start_lr=float(run.get("warmup_lr", -1)),
                warmup_steps=int(run.get("warmup_steps", 0)),
                steps_per_epoch=self.steps_per_epoch,
            )
        return self._lr_sched

    def setup_output_dir(self) -> None:
        """Create ``run.output_dir``/job id, relative to the current folder, and register it with LAVIS."""
        self.output_dir = Path(self.config.run_cfg.output_dir).absolute() / self.job_id
        self.result_dir = self.output_dir / "result"
        make_folder(self.result_dir, "run.output_dir:")
        paths = registry.mapping["paths"]
        paths["output_dir"], paths["result_dir"] = str(self.output_dir), str(self.result_dir)

    @property
    def train_loader(self) -> Any:
        """The loader of the split ``train``."""
        return self.dataloaders["train"]

    @property
    def dataloaders(self) -> dict[str, Any]:
        """One loader per split, with training datasets joined; without training, only for the splits to evaluate."""
        if self._dataloaders is None:
            self.datasets = concat_datasets(reorg_datasets_by_split(self.datasets))
            if self.evaluate_only:
                asked = {*self.valid_splits, *self.test_splits}
                self.datasets = {split: dataset for split, dataset in self.datasets.items() if split in asked}
            self._dataloaders = {split: self._loader(split, dataset) for split, dataset in self.datasets.items()}
        return self._dataloaders

    def check_splits_to_come(self) -> None:
        """Let the task reject, before all else, splits that it could not evaluate; the random state stays as it is."""
        check = getattr(self.task, "check_split", lambda name, dataset: None)  # LAVIS's tasks have none
        loaders = self.dataloaders
        with rng.seeded(self.options.seed):
            for split in {*self.valid_splits, *self.test_splits}:
                check(split, loaders[split].dataset)

    def _loader(self, split: str, dataset: Any) -> Any:
        """Make the loader of a split.

        Training drops the last samples of an epoch that do not fill a batch on every process. Samples
        that can't be read are skipped or fatal, as ``run.on_corrupt`` says.
        """
        run = self.config.run_cfg
        trains = split in self.train_splits and not self.evaluate_only
        batch: dict[str, Any] = {
            "batch_size": int(run.batch_size_train if trains else run.batch_size_eval),
            "num_workers": int(run.num_workers),
            "pin_memory": self.device.type == "cuda",
            "timeout": self.options.loader_timeout if int(run.num_workers) else 0,
        }
        if trains:
            return self._training_loader(dataset, run.get("train_dataset_ratios"), **batch)
        if isinstance(dataset, IterableDataset):
            raise UserError("a stream of shards can be trained on but not evaluated: it has no length")
        batch["collate_fn"] = getattr(dataset, "collater", None)
        share = self.use_distributed and self.use_dist_eval_sampler
        return eval_loader(self._guarded(dataset, usual="raise"), share=share, **batch)

    def _training_loader(self, dataset: Any, ratios: Sequence[Any] | None, **batch: Any) -> EpochLoader:
        """Return the loader of joined map-style datasets, of streams, or of both taking turns.

        Args:
            dataset: the result of LAVIS's ``concat_datasets``: joined datasets, chained streams, or a pair of the two.
            ratios: ``run.train_dataset_ratios``, shares of an epoch (see ``engine.sampling.Mixture``), one for each
                dataset in the order of the configuration, streams last.
            batch: arguments of the loaders.

        Raises:
            UserError: ``run.iters_per_epoch`` or ``run.train_dataset_ratios`` does not fit the datasets.
        """
        parts = dataset if isinstance(dataset, tuple) else (dataset,)
        streams = [s for part in parts if isinstance(part, IterableDataset) for s in getattr(part, "datasets", [part])]
        mapped = next((part for part in parts if not isinstance(part, IterableDataset)), None)
        sizes = [len(one) for one in members(mapped)] if mapped is not None else []
        own, shares = None, [1.0] * (len(streams) + (mapped is not None))
        if ratios is not None:
            check_ratios(ratios, [f"{size} samples" for size in sizes] + ["a stream"] * len(streams))
            own = ratios[: len(sizes)]
            shares = [*([sum(own)] if own else []), *ratios[len(sizes) :]]
        turns = iter(self._turns(shares, bool(streams)))
        loaders: list[EpochLoader] = []
        if mapped is not None:
            mapped = self._guarded(mapped, usual="skip")
            batch_of = {"collate_fn": getattr(mapped, "collater", None), "batches": next(turns), **batch}
            loaders.append(train_loader(mapped, seed=self.options.seed, ratios=own, **batch_of))
        for stream in streams:
            loaders.append(self._stream_loader(stream, number=len(loaders), batches=next(turns), **batch))
        return loaders[0] if len(loaders) == 1 else JoinedLoader(loaders, seed=self.options.seed)

    def _turns(self, shares: Sequence[float], has_streams: bool) -> list[int]:
        """Return how many batches each loader contributes to an epoch, 0 for all that it has."""
        total = self.options.iters_per_epoch
        turns = split_by(shares, total)
        if has_streams and not all(turns):
            raise UserError(
                f"run.iters_per_epoch is {total}; a stream of shards has no length: set it to the batches per process "
                f"in an epoch, at least one for each of {len(shares)} source(s)"
            )
        return turns

    def _stream_loader(self, pipeline: Any, *, number: int, batches: int, **batch: Any) -> StreamLoader:
        own_guard = StreamGuard(on_corrupt=self.options.on_corrupt or "skip")
        self.guards.append(own_guard)
        lanes = world_size() * max(1, batch["num_workers"])
        stream = ShardStream(pipeline, seed=rng.seed_of(self.options.seed, number), guard=own_guard, lanes=lanes)
        return StreamLoader(stream, batches=batches, collate_fn=getattr(pipeline, "collater", None), **batch)

    def _guarded(self, dataset: Any, *, usual: str) -> Any:
        dataset = guard(dataset, on_corrupt=self.options.on_corrupt or usual)
        self.guards += guards_in(dataset)
        return dataset

    @property
    def has_streams(self) -> bool:
        """Whether training reads streams of shards."""
        return any(isinstance(found, StreamGuard) for found in self.guards)

    def corrupt(self) -> list[str]:
        """Name the samples skipped so far by this process and the workers of its loaders."""
        return [name for dataset in self.guards for name in dataset.corrupt()]


def size_of(data: Any) -> str:
    """Say how many samples a split has."""
    if isinstance(data, tuple):
        return " + ".join(map(size_of, data))
    return "a stream" if isinstance(data, IterableDataset) else str(len(data))


def _halves_to_float(model: nn.Module) -> None:
    """Convert fp16 weights to fp32, since CPUs support few operations in fp16."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
