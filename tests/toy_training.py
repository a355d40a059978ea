"""A toy model and dataset that use every random source, and a command that trains them.

``python toy_training.py KEY=VALUE ...`` runs the real entry point's steps on the toy; values are of ``run:``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.models.base_model import BaseModel
from omegaconf import OmegaConf
from torch import nn

import lavis_xformer
from lavis_xformer import distributed, launch

lavis_xformer.register()
WIDTH = 8


class ToyPairs(BaseDataset):
    """Pairs of a noisy vector and the word for its class: 'c0' to 'c3'; two captions per image."""

    def __init__(self, length=48, broken=(), augmented=True, delay=0.0, unreadable=(), deadly=()):
        self.length, self.broken, self.augmented, self.delay = length, broken, augmented, delay
        self.unreadable, self.deadly = unreadable, deadly

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        time.sleep(self.delay)
        if index in self.unreadable:
            raise OSError("broken data stream")
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        image = index // 2
        generator = torch.Generator().manual_seed(image % 4)
        noise = random.random() + np.random.rand() + torch.rand(WIDTH)
        value = torch.randn(WIDTH, generator=generator) + 0.05 * noise * self.augmented
        if index in self.broken:
            value = value * float("nan")
        return {"image": value, "text_input": f"c{image % 4}", "image_id": f"i{image}"}


class ToyModel(BaseModel):
    """A frozen projection, a trained one with dropout, and word embeddings, trained contrastively."""

    def __init__(self, dropout=0.1, dtype=torch.float64):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.image = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH))
        self.words = nn.Embedding(4, WIDTH)
        self.tied_to_frozen = self.frozen
        self.to(dtype)

    def image_features(self, samples):
        pixels = samples["image"].to(self.words.weight.dtype)
        return nn.functional.normalize(self.image(self.frozen(pixels)), dim=-1)

    def text_features(self, samples):
        ids = torch.tensor([int(text[1:]) for text in samples["text_input"]], device=self.device)
        return nn.functional.normalize(self.words(ids), dim=-1)

    def forward(self, samples):
        image, text = self.image_features(samples), self.text_features(samples)
        rows = distributed.own_rows(len(image), image.device)
        logits = 5 * image @ distributed.gather(text).T
        loss_itc = nn.functional.cross_entropy(logits, rows)
        loss_rec = (image - text).square().mean()
        accuracy = (logits.argmax(1) == rows).double().mean()
        return {
            "loss": loss_itc + loss_rec,
            "loss_itc": loss_itc,
            "loss_rec": loss_rec,
            "itm_accuracy": accuracy,
            "features": image,
        }

    def extract_features(self, samples, mode):
        image, text = self.image_features(samples)[:, None], self.text_features(samples)[:, None]
        return SimpleNamespace(image_embeds_proj=image, text_embeds_proj=text)


class ToyConfig:
    """LAVIS's interface of a configuration."""

    def __init__(self, run):
        self.config = OmegaConf.create({"run": run, "model": {}, "datasets": {"toy": {}}})
        self.run_cfg, self.model_cfg = self.config.run, self.config.model

    def to_dict(self):
        return OmegaConf.to_container(self.config)


DEFAULTS = {
    "task": "xformer_stage1", "lr_sched": "xformer_warmup_cosine_lr", "init_lr": 2e-2, "min_lr": 1e-3,
    "warmup_steps": 4, "weight_decay": 0.05, "max_epoch": 3, "batch_size_train": 8, "batch_size_eval": 8,
    "num_workers": 0, "train_splits": ["train"], "valid_splits": ["val"], "device": "cpu", "seed": 1,
    "evaluate": False, "tensorboard": False, "log_freq": 4, "output_dir": "output",
}  # fmt: skip


def make_runner(output_dir, *, dropout=0.1, broken=(), length=48, delay=0.0, datasets=None, **run):
    """Build the runner that the entry point would build for the toy."""
    from lavis.common.registry import registry
    from lavis.tasks import setup_task

    from lavis_xformer.engine import jobs, rng
    from lavis_xformer.engine.options import RunOptions, check_splits

    config = ToyConfig({**DEFAULTS, "output_dir": str(output_dir), **run})
    options = RunOptions.from_config(config.run_cfg)
    job_id = jobs.choose(config.to_dict(), job_id=options.job_id, resume=options.resume)
    faults = {kind: run.pop(kind, ()) for kind in ("unreadable", "deadly")}
    toy = {"train": ToyPairs(length, broken, delay=delay, **faults), "val": ToyPairs(17, augmented=False)}
    datasets = datasets or {"toy": toy}
    check_splits(config.run_cfg, datasets)
    rng.seed_everything(options.seed)
    model = ToyModel(dropout)
    rng.seed_everything(rng.seed_of(options.seed, distributed.rank()))
    runner_class = registry.get_runner_class("xformer_runner")
    return runner_class(config, setup_task(config), model, datasets, job_id)


def train(place, **options):
    """Train the toy within a process group and save this process's weights."""
    from lavis_xformer.engine.log import setup_logging

    setup_logging(shown=place.rank == 0)
    runner = make_runner(options.pop("output_dir"), **options)
    runner.train()
    torch.save(runner.unwrap_dist_model(runner.model).state_dict(), f"{runner.output_dir}/final{place.rank}.pt")


def command(argv):
    options = OmegaConf.to_container(OmegaConf.from_dotlist(argv))
    with launch.process_group("cpu") as place:
        train(place, **options)
    return 0


if __name__ == "__main__":
    from lavis_xformer.cli import run

    raise SystemExit(run(command, sys.argv[1:]))
