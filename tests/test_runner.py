"""The runner on a toy: it learns, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import json

import pytest
import torch
import toy_training

from lavis_xformer.engine import checkpoint


def weights(runner):
    return {name: value.clone() for name, value in runner.state.model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def records(runner, kind):
    lines = (runner.output_dir / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    runner = toy_training.make_runner(tmp_path_factory.mktemp("run"), job_id="a")
    runner.summary = runner.train()
    return runner


def test_a_run_learns_and_leaves_everything(unbroken):
    steps, evals = records(unbroken, "step"), records(unbroken, "eval")
    assert [record["step"] for record in steps] == list(range(1, 19))
    assert evals[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert {"loss_itc", "loss_rec", "lr", "grad_norm", "images_per_s", "data_wait"} <= steps[0].keys()
    assert unbroken.summary["best"]["agg_metrics"] == max(r["agg_metrics"] for r in evals)
    assert {path.name for path in unbroken.output_dir.glob("*.pth")} == {
        "checkpoint_0.pth", "checkpoint_1.pth", "checkpoint_2.pth", "checkpoint_best.pth"
    }  # fmt: skip


def test_a_checkpoint_holds_no_frozen_weight(unbroken):
    names = checkpoint.read(unbroken.output_dir / checkpoint.BEST)["model"].keys()
    assert names == {"image.0.weight", "image.0.bias", "image.2.weight", "image.2.bias", "words.weight"}


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_within_an_epoch_gives_the_unbroken_weights(unbroken, tmp_path, workers):
    first = toy_training.make_runner(tmp_path, job_id="a", save_every_steps=4, keep_last=0, num_workers=workers)
    first.train()
    assert_same(weights(first), weights(unbroken))
    for name in ("checkpoint_0_step4.pth", "checkpoint_1.pth", "checkpoint_2_step4.pth"):
        again = toy_training.make_runner(
            tmp_path, job_id=name, resume_ckpt_path=str(first.output_dir / name), num_workers=workers
        )
        summary = again.train()
        assert_same(weights(again), weights(unbroken))
        assert summary["best"] == unbroken.summary["best"]
