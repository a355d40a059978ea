"""What the safe training loop costs compared with a bare loop over the same model and batches.

``python run_scripts/overhead.py``. Both take turns in one process, a few steps at a time, and CPU time is compared pair
by pair, so that other load on the machine matters little. The data are in memory, since loading costs both the same.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from typing import Any

import torch

import lavis_xformer
from lavis_xformer.config.load import load_config
from lavis_xformer.engine.log import Averages
from lavis_xformer.engine.loop import EpochLoop, Position
from lavis_xformer.engine.options import RunOptions
from lavis_xformer.train import build_runner

OPTIONS = (
    "run.amp=no run.muon=0 run.max_epoch=1 run.valid_splits=[] run.tensorboard=False "
    "datasets.xformer_scenes.splits.train.scenes={} run.output_dir={}"
)


def bare(runner: Any, batches: list[Any], steps: int) -> float:
    """Return the CPU seconds of a bare training loop."""
    start = time.process_time()
    for samples in itertools.islice(itertools.cycle(batches), steps):
        runner.model(samples)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(runner.stepper.parameters, runner.options.max_grad_norm)
        runner.optimizer.step()
        runner.optimizer.zero_grad(set_to_none=True)
    return time.process_time() - start


def safe(runner: Any, batches: list[Any], steps: int) -> float:
    """Return the CPU seconds of the runner's loop, its log included."""
    loop = EpochLoop(
        stepper=runner.stepper,
        schedule=runner.lr_scheduler,
        position=Position(),
        averages=Averages(),
        options=RunOptions(),
        accumulate=1,
        log_every=50,
        interruption=runner.interruption,
        save=lambda: None,
        log=runner.log,
        folder=runner.output_dir,
    )
    start = time.process_time()
    forever: Any = itertools.cycle(batches)
    loop.run(forever, batches=steps)
    return time.process_time() - start


def main() -> None:
    """Print the ratio of each pair, and their median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="per turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lavis_xformer.register()
    with tempfile.TemporaryDirectory() as folder:
        options = OPTIONS.format(128, folder).split()
        runner = build_runner(load_config("projects/xformer/pretrain.yaml", options))
        runner.log_config()
        runner.model.train()
        batches = list(runner.train_loader)
        turns = (bare, safe)
        for turn in turns:
            turn(runner, batches, 2)
        ratios = []
        for number in range(arguments.pairs):
            order = turns if number % 2 else turns[::-1]
            spent = {turn: turn(runner, batches, arguments.steps) for turn in order}
            ratios.append(spent[safe] / spent[bare])
            print(f"bare {spent[bare] / arguments.steps:.3f} s/step  safe/bare {ratios[-1]:.3f}", flush=True)
        spread = statistics.quantiles(ratios, n=4)
        print(f"median {statistics.median(ratios):.4f}, quartiles {spread[0]:.4f} to {spread[2]:.4f}")


if __name__ == "__main__":
    main()
