"""Two processes on gloo train as one does on the joined batch, and end in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_training
import toy_xformer

from lavis_xformer import run_folder
from lavis_xformer.engine import rng

SCRIPT = Path(__file__).with_name("toy_training.py")

GATHER = """
import torch
from lavis_xformer import launch
from lavis_xformer.distributed import gather, rank
with launch.process_group("cpu"):
    part = torch.ones(2, 3, requires_grad=True)
    weights = torch.arange(12.0).reshape(3, 4).t()  # (4, 3)
    gather(part).backward(weights)
    assert torch.equal(part.grad, 2 * weights[2 * rank() : 2 * rank() + 2])
"""


TRAININGS = """
import itertools
import json
import sys
import time
import torch
import toy_training
import toy_xformer
from lavis_xformer import launch
from lavis_xformer.engine import checkpoint
from lavis_xformer.tasks.stage1 import Stage1Task
folder, *jobs = sys.argv[1:]
with launch.process_group("cpu") as place:
    torch.save(toy_xformer.train(), f"{folder}/rank{place.rank}")
    for job in jobs:
        toy_training.train(place, output_dir=folder, **json.loads(job))
    figures, alias = itertools.count(), checkpoint.alias
    Stage1Task.goal = lambda self, _: float(next(figures))  # every epoch is the best so far
    checkpoint.alias = lambda *paths: (time.sleep(0.2), alias(*paths))  # and its name takes a while
    toy_training.train(place, output_dir=folder, job_id="last_is_best", batch_size_train=4, test_splits=["val"])
"""
JOINED = {"dropout": 0, "max_epoch": 4, "accum_grad_iters": 2}
EACH_ALL = {"dropout": 0, "use_dist_eval_sampler": False}


def torchrun(*options, processes=2, script=SCRIPT):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), *options]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of all that two processes trained, one after the other, as they take seconds to start."""
    folder, script = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("script") / "trainings.py"
    script.write_text(TRAININGS)
    jobs = [
        {"job_id": "joined", "batch_size_train": 4, "batch_size_eval": 4, **JOINED},
        {"job_id": "each_all", "batch_size_train": 4, **EACH_ALL},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SCRIPT.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        done = torchrun(str(folder), *map(json.dumps, jobs), script=script)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_equal_one_on_the_joined_batch(two, tmp_path):
    one = toy_training.make_runner(tmp_path, job_id="one", batch_size_train=8, **JOINED)
    one.train()
    states = [torch.load(two / "joined" / f"final{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in one.state.model.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], value, rtol=0, atol=1e-5)
    logs = [run_folder.read_log(folder) for folder in (two / "joined", tmp_path / "one")]
    for left, right in zip(*logs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=0.5 if left["kind"] == "eval" else 1e-5)
        assert left.get("i2t_r1") == pytest.approx(right.get("i2t_r1"))
        assert left.get("t2i_r5") == pytest.approx(right.get("t2i_r5"))


def test_all_test_the_same_weights_though_the_best_has_just_got_its_name(two):
    states = [torch.load(two / "last_is_best" / f"final{rank}.pt", weights_only=True) for rank in (0, 1)]
    best = torch.load(two / "last_is_best" / run_folder.BEST, weights_only=True)
    assert best["epoch"] == 2
    for name, value in best["model"].items():
        assert torch.equal(states[0][name], value), name
        assert torch.equal(states[1][name], value), name


def test_the_four_losses_of_two_processes_equal_those_of_one_on_the_joined_batch(two):
    one = toy_xformer.train()
    assert {"loss", "loss_itc", "loss_itm", "loss_itg", "loss_rec", "grad_norm"} <= one["history"][0].keys()
    for rank in (0, 1):
        found = torch.load(two / f"rank{rank}", weights_only=True)
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gathering_passes_on_gradients_that_are_transposed_in_memory(tmp_path):
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    done = torchrun(script=script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(tmp_path):
    options = ("batch_size_train=4", "save_every_steps=4", "keep_last=0", "num_workers=2")
    assert torchrun(f"output_dir={tmp_path}", "job_id=a", *options).returncode == 0
    path = tmp_path / "a" / "checkpoint_1_step8.pth"
    done = torchrun(f"output_dir={tmp_path}", "job_id=b", f"resume_ckpt_path={path}", *options)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        left, right = (torch.load(tmp_path / job / f"final{rank}.pt", weights_only=True) for job in "ab")
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_a_failure_of_one_rank_ends_all_with_its_line(tmp_path):
    done = torchrun(f"output_dir={tmp_path}", "broken=[7]", "batch_size_train=4")
    assert done.returncode != 0
    assert "not finite in step" in done.stderr
    assert "'i3'" in done.stderr


def test_a_worker_that_one_rank_loses_stops_all_after_a_save(tmp_path):
    order = torch.randperm(96, generator=torch.Generator().manual_seed(rng.seed_of(1, 0))).tolist()
    deadly = order[8 * 5 + 6]  # in the sixth joined batch, rank 1's part
    done = torchrun(
        f"output_dir={tmp_path}", "job_id=a", "batch_size_train=4", "length=96", f"deadly=[{deadly}]", "num_workers=1"
    )
    assert done.returncode != 0
    assert done.stderr.count("error: a data worker died or timed out") == 2, "each rank's one line"
    assert list((tmp_path / "a").glob("checkpoint_0_step*.pth"))


def test_processes_that_each_evaluate_all_count_no_caption_twice(two, tmp_path):
    toy_training.make_runner(tmp_path, job_id="one", dropout=0).train()
    folders = (two / "each_all", tmp_path / "one")
    logs = [[record for record in run_folder.read_log(folder) if record["kind"] == "eval"] for folder in folders]
    for found, one in zip(*logs, strict=True):
        assert {"loss", "loss_itc", "i2t_r1", "chance_t2i_r1"} <= found.keys()
        assert found == pytest.approx(one, abs=1e-4), "nor contrast a sample with itself"


@pytest.mark.slow
def test_a_sample_that_one_rank_cannot_read_stops_all_after_a_save(tmp_path):
    order = torch.randperm(96, generator=torch.Generator().manual_seed(rng.seed_of(1, 0))).tolist()
    bad = order[8 * 5 + 6]  # in the sixth joined batch, rank 1's part
    done = torchrun(
        f"output_dir={tmp_path}", "job_id=a", "batch_size_train=4", "length=96", f"unreadable=[{bad}]",
        "on_corrupt=raise",
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count(f"error: sample {bad} of ToyPairs: broken data stream") == 2, "each rank's one line"
    assert "exitcode  : 2" in done.stderr
    assert (tmp_path / "a" / "checkpoint_0_step5.pth").exists()
    done = torchrun(
        f"output_dir={tmp_path}", "job_id=a", "batch_size_train=4", "length=96", f"unreadable=[{bad}]", "resume=auto"
    )
    assert done.returncode == 0, done.stderr
    assert run_folder.read_log(tmp_path / "a")[-1]["kind"] == "eval"
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["corrupt"] == [f"sample {bad} of ToyPairs"]
