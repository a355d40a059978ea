"""``xformer_runner``: trains with a task of this package or of LAVIS, and never loses work.

LAVIS's YAML keys keep their meaning; the added ones are in ``engine.options.RunOptions``.
"""

from __future__ import annotations

import logging
import math
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from lavis.common.registry import registry
from torch import nn

from lavis_xformer import distributed, run_folder
from lavis_xformer.distributed import is_main, rank, world_size
from lavis_xformer.engine import checkpoint, jobs, rng
from lavis_xformer.engine.interruption import Interruption
from lavis_xformer.engine.log import MetricsLog, peak_memory_mb, plain
from lavis_xformer.engine.loop import EpochLoop
from lavis_xformer.engine.state import TrainingState
from lavis_xformer.engine.step import Stepper, computes_bf16
from lavis_xformer.errors import UserError
from lavis_xformer.files import read_json, write_json
from lavis_xformer.paths import checkpoints_of
from lavis_xformer.runners.portable import PortableRunner, size_of
from lavis_xformer.state_dicts import load_trainable, weights_told

SOURCES = {f"model.{key}" for key in "pretrained finetuned load_finetuned blip2_pretrained train_only".split()}

logger = logging.getLogger(__name__)


@registry.register_runner("xformer_runner")
class XFormerRunner(PortableRunner):
    """Trains, validates, saves and resumes; a resumed run ends with the weights of an uninterrupted one."""

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: dict[str, Any], job_id: str) -> None:
        super().__init__(cfg, task, model, datasets, job_id)
        self.interruption = Interruption()
        self.metrics_log: MetricsLog | None = None
        self._save_error = ""
        self._lock: IO[str] | None = None

    @cached_property
    def stepper(self) -> Stepper:
        """Gradients and updates for the task's loss."""
        return Stepper(
            model=self.model,
            optimizer=self.optimizer,
            forward=getattr(self.task, "train_terms", self._lavis_train_step),
            amp=self.amp,
            scaler=self.scaler,
            max_grad_norm=self.options.max_grad_norm,
        )

    @cached_property
    def state(self) -> TrainingState:
        """Everything that a checkpoint holds."""
        return TrainingState(
            model=self.unwrap_dist_model(self.model),
            optimizer=self.optimizer,
            scaler=self.scaler,
            config=self.config.to_dict(),
            batches_per_epoch=self.batches_per_epoch,
            steps_per_epoch=self.steps_per_epoch,
            seed=self.options.seed,
            has_streams=self.has_streams,
        )

    def _lavis_train_step(self, model: nn.Module, samples: Any) -> dict[str, Any]:
        """Pass a LAVIS model what LAVIS's tasks pass: ALBEF and BLIP ramp up their distillation by the position."""
        position = self.state.position
        place = {"epoch": position.epoch, "num_iters_per_epoch": self.batches_per_epoch, "iters": position.batches}
        return {"loss": self.task.train_step(model=model, samples={**samples, **place})}

    # --- training ---------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train from the run's current position to the end; return and write its summary."""
        with self.interruption:
            self.check_splits_to_come()
            if self.evaluate_only:
                return self._evaluate_only()
            self._lock = jobs.claim(self.output_dir)
            finished = self._resume()
            if finished is not None:
                return finished
            self.log_config()
            self._announce()
            for epoch in range(self.state.position.epoch, self.max_epoch):
                with self.interruption.deferred():
                    self.log_stats(self.train_epoch(epoch), "train")
                    self._save_checkpoint()
                self._validate(epoch)
                self.state.next_epoch()
            return self._finish()

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train what is left of ``epoch``; return its mean terms."""
        self.model.train()
        self.train_loader.start(epoch=epoch, skip_batches=self.state.position.batches)
        loop = EpochLoop(
            stepper=self.stepper,
            schedule=self.lr_scheduler,
            position=self.state.position,
            averages=self.state.averages,
            options=self.options,
            accumulate=self.accum_grad_iters,
            log_every=self.log_freq,
            interruption=self.interruption,
            save=self._save_checkpoint,
            log=self.log,
            folder=self.output_dir,
        )
        means = loop.run(self.train_loader, batches=self.batches_per_epoch)
        self._count_corrupt()
        means["corrupt_samples"] = self.state.corrupt.count
        self.log("epoch", means, split="train")
        return means

    def _count_corrupt(self) -> None:
        """Add the samples that any rank has skipped since the last (re)start to those skipped before."""
        self.state.corrupt.update(self._corrupt_anywhere())

    def _corrupt_anywhere(self) -> set[str]:
        """The samples that any rank has skipped since the last (re)start."""
        return {name for names in distributed.collect(self.corrupt()) for name in names}

    def eval_epoch(self, split_name: str, cur_epoch: int | str, skip_reload: bool = False) -> dict[str, Any] | None:
        """Evaluate a split with seeded randomness; the training's random state is untouched.

        ``cur_epoch`` may be ``best``: the best checkpoint is loaded first, unless ``skip_reload``.
        """
        loader = self.dataloaders.get(split_name)
        if loader is None:
            raise UserError(f"the datasets have no split '{split_name}', only {list(self.datasets)}")
        model = self.unwrap_dist_model(self.model)
        if cur_epoch == "best" and not skip_reload:
            self._load_best()
        model.eval()
        precision = torch.autocast(self.device.type, dtype=self.eval_dtype, enabled=self.eval_dtype is not None)
        with rng.seeded(rng.seed_of(self.options.seed, rank())), torch.no_grad(), precision:
            self.task.before_evaluation(model=model, dataset=self.datasets[split_name])
            results = self.task.evaluation(model, loader, cuda_enabled=self.device.type == "cuda")
            if results is None:
                return None
            figures = self.task.after_evaluation(val_result=results, split_name=split_name, epoch=cur_epoch)
            return figures and {name: plain(value) for name, value in figures.items()}  # a checkpoint holds them

    def _validate(self, epoch: int) -> None:
        """Evaluate the validation splits; the best epoch's checkpoint gets a second name."""
        for split in self.valid_splits:
            figures = distributed.share(self.eval_epoch(split, epoch))
            if figures is None:
                continue
            if "agg_metrics" not in figures:
                raise UserError(f"{type(self.task).__name__} returns no 'agg_metrics' for '{split}'")
            decides = split == ("val" if "val" in self.valid_splits else self.valid_splits[0])
            decides = decides and not self._save_error  # no best epoch without its checkpoint
            if decides and figures["agg_metrics"] > self.state.best.get("agg_metrics", -math.inf):
                self.state.best = {"epoch": epoch, "split": split, **figures}
                self._name_best(epoch)
            self.log("eval", figures, split=split)
            self.log_stats({**figures, "best_epoch": self.state.best.get("epoch")}, split)

    def _finish(self) -> dict[str, Any]:
        """Evaluate the test splits with the best weights (the last if not validated), and write the summary.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        if self._save_error:
            raise UserError(f"{self._save_error}; make room, then run.resume=auto resumes from the one before")
        if not self.state.best:
            self._name_best(self.max_epoch - 1)
        test = self.evaluate(cur_epoch="best") or {}
        for split, figures in test.items():
            self.log("test", figures or {}, split=split, epoch=self.state.best.get("epoch", self.max_epoch - 1))
        self._count_corrupt()  # of the evaluations too
        position = self.state.position
        summary = {
            "finished": True,
            "steps": position.steps,
            "skipped": position.skipped,
            "corrupt": self.state.corrupt.names,
            "corrupt_count": self.state.corrupt.count,
            "best": self.state.best,
            "test": test,
            "device": self.device.type,
            "amp": self.amp,
            "peak_memory_mb": round(peak_memory_mb(self.device), 1),
            "versions": jobs.versions(),
        }
        if is_main():
            write_json(self.output_dir / run_folder.SUMMARY, summary)
        if self.metrics_log is not None:
            self.metrics_log.close()
        return summary

    def _evaluate_only(self) -> dict[str, Any]:
        """Evaluate validation and test splits with the weights that the configuration names."""
        self._load_evaluated()
        splits = dict.fromkeys([*self.valid_splits, *self.test_splits])
        figures = {split: self.eval_epoch(split, "best", skip_reload=True) for split in splits}
        for split, values in figures.items():
            self.log_stats(values, split)
        skipped = sorted(self._corrupt_anywhere())
        return {"finished": False, "best": {}, "test": figures, "corrupt": skipped, "corrupt_count": len(skipped)}

    def _load_evaluated(self) -> None:
        """Load what ``resume_ckpt_path`` names, else this folder's best if no weights but its start's are named."""
        best, ran = self.output_dir / run_folder.BEST, self.output_dir / run_folder.CONFIG
        started_from = checkpoints_of(read_json(ran)["model"]) if ran.exists() else {}
        none_else = checkpoints_of(self.config.model_cfg).items() <= started_from.items()
        path = self.resume_ckpt_path or (str(best) if best.exists() and none_else else None)
        if path is None:
            if untrained := getattr(self.unwrap_dist_model(self.model), "untrained", ""):
                logger.warning("weights are evaluated that were never trained: %s", untrained)
            return
        content, config = checkpoint.read(Path(path)), self.config.to_dict()
        trained = content.get("config", config)
        if changes := jobs.differences({"model": trained["model"]}, {"model": config["model"]}, incidental=SOURCES):
            logger.warning("%s was trained with other settings of the model: %s", path, "; ".join(changes))
        load_trainable(self.unwrap_dist_model(self.model), content["model"], source=path)
        logger.info("evaluating the weights of %s", path)

    def log_config(self) -> None:
        """Write the configuration: LAVIS's ``log.txt``, and ``config.json``; open the log."""
        super().log_config()
        if not is_main():
            return
        (self.output_dir / run_folder.SUMMARY).unlink(missing_ok=True)  # of a finished run, now trained for longer
        write_json(self.output_dir / run_folder.CONFIG, self.config.to_dict())
        self.metrics_log = MetricsLog(
            self.output_dir,
            from_step=self.state.position.steps,
            tensorboard=self.options.tensorboard,
            wandb=self.options.wandb,
        )

    def log_stats(self, stats: Any, split_name: str) -> None:
        """Write LAVIS's ``log.txt``; a full disk costs a warning, not the run."""
        try:
            super().log_stats(stats, split_name)
        except OSError as error:
            logger.warning("log.txt can't be written: %s; continuing", error)

    def log(self, kind: str, values: dict[str, Any], **about: Any) -> None:
        """Write a record at the current position to ``log.jsonl``, on the main process."""
        if self.metrics_log is not None:
            position = self.state.position
            self.metrics_log.write(kind, **{"epoch": position.epoch, **about}, step=position.steps, values=values)

    def _announce(self) -> None:
        """Log what is about to run."""
        batch = f"{self.config.run_cfg.batch_size_train} x {world_size()} x {self.accum_grad_iters}"
        emulated = self.amp == "bf16" and not computes_bf16(self.device)
        precision = f"{self.amp} (slow: this device only emulates it; run.amp=auto avoids it)" if emulated else self.amp
        steps = f"{self.max_epoch} epoch(s) of {self.steps_per_epoch} steps"
        told = {
            "model": weights_told(self.state.model),
            "data": ", ".join(f"{split} {size_of(data)}" for split, data in self.datasets.items()),
            "train": f"{steps}, batch x processes x accumulation: {batch}",
            "on": f"{world_size()} process(es), {self.device.type}, mixed precision: {precision}",
            "output": self.output_dir,
        }
        for name, value in told.items():
            logger.info("%-7s %s", name, value)
        warmup, total = int(self.config.run_cfg.get("warmup_steps", 0)), self.max_epoch * self.steps_per_epoch
        if warmup >= total:
            logger.warning("run.warmup_steps is %d of %d: the learning rate never reaches run.init_lr", warmup, total)

    # --- checkpoints ------------------------------------------------------------

    def _name_best(self, epoch: int) -> None:
        """Give the checkpoint from an epoch's end its second name, that of the best."""
        saved = self.output_dir / checkpoint.name_of(epoch)
        if is_main() and saved.exists():
            checkpoint.alias(saved, self.output_dir / run_folder.BEST)

    def _save_checkpoint(self) -> None:
        """Save the current position; must be called on all ranks."""
        self._count_corrupt()
        states = distributed.collect(rng.capture())
        position = self.state.position
        name = checkpoint.name_of(position.epoch, None if self.state.epoch_done else position.steps)
        self._save_error = distributed.share(self._write(name, states) if is_main() else "")
        if self._save_error:
            logger.warning("%s; continuing, earlier checkpoints are intact", self._save_error)

    def _write(self, name: str, states: list[dict[str, Any]]) -> str:
        """Write a checkpoint and remove old ones; return what failed, empty on success."""
        try:
            checkpoint.write(self.output_dir / name, self.state.as_dict(states))
        except OSError as error:
            return f"{name} could not be written: {error}"
        checkpoint.prune(self.output_dir, keep=self.options.keep_last)
        return ""

    def _resume(self) -> dict[str, Any] | None:
        """Resume as ``resume: auto`` or ``resume_ckpt_path`` says; return the summary if the run has finished.

        Raises:
            UserError: a checkpoint can't be resumed from, or the folder holds another run's checkpoints.
        """
        if self.options.resume == "auto":
            path = distributed.share(checkpoint.newest(self.output_dir) if is_main() else None)
            summary = distributed.share(jobs.read_summary(self.output_dir))
            if path is not None:
                self._go_on_from(str(path))
                if summary is None or not self._trained or set(self.test_splits) - summary["test"].keys():
                    return None
                logger.info("this run has finished: nothing to do in %s", self.output_dir)
                return summary
        jobs.check_unused(self.output_dir)
        if self.resume_ckpt_path is not None:
            self._go_on_from(self.resume_ckpt_path)
            if self._trained and not self.test_splits:
                raise UserError(
                    f"run.resume_ckpt_path: the training of {self.resume_ckpt_path} has finished, as run.max_epoch is "
                    f"{self.max_epoch}: raise it, or evaluate the checkpoint by python -m lavis.evaluate"
                )
        return None

    @property
    def _trained(self) -> bool:
        """Whether no epoch is left to train."""
        epoch = self.state.position.epoch
        return epoch >= self.max_epoch or (epoch == self.max_epoch - 1 and self.state.epoch_done)

    def _go_on_from(self, path: str) -> None:
        """Resume from a checkpoint, which may be one of LAVIS's own runner."""
        self.state.restore(checkpoint.read(Path(path)), source=path)
        if not distributed.share((self.output_dir / run_folder.BEST).exists()):
            self.state.best = {}  # its weights are in another folder
        position = self.state.position
        logger.info("resuming from %s: epoch %d, step %d", path, position.epoch, position.steps)
        if self._trained:
            logger.info("its training has finished; run.max_epoch is %d", self.max_epoch)

    def _load_best(self) -> None:
        """Load the weights of the best checkpoint; without one, keep the last and say so.

        Rank 0, which named it, reads it for all: another may still see the file that had this name before.
        """
        path = self.output_dir / run_folder.BEST
        best = distributed.share(checkpoint.read(path)["model"] if is_main() and path.exists() else None)
        if best is not None:
            load_trainable(self.unwrap_dist_model(self.model), best, source=str(path))
        else:
            logger.info("no best checkpoint was chosen: testing the last weights")
