"""The runner on a toy: it learns, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_training
from PIL import Image

from lavis_xformer import conclude, run_folder
from lavis_xformer.analysis import report
from lavis_xformer.engine import checkpoint, jobs, loop, rng, state
from lavis_xformer.engine.log import Averages
from lavis_xformer.errors import UserError
from lavis_xformer.tasks import base as tasks_base


def weights(runner):
    return {name: value.clone() for name, value in runner.state.model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def records(runner, kind):
    lines = (runner.output_dir / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def signal_in_step(runner, step, send):
    """Call ``send`` in the how-manieth optimiser step, counted from 0."""
    apply = runner.stepper.apply

    def apply_then_signal():
        apply()
        if runner.state.position.steps == step:
            send()

    runner.stepper.apply = apply_then_signal


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
    assert unbroken.summary["device"] == "cpu"
    assert unbroken.summary["amp"] == "no"
    assert unbroken.summary["peak_memory_mb"] > 100
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
    for name in ("checkpoint_0_step4.pth", "checkpoint_1.pth", "checkpoint_2_step16.pth"):
        again = toy_training.make_runner(
            tmp_path, job_id=name, resume_ckpt_path=str(first.output_dir / name), num_workers=workers
        )
        again.train()
        assert_same(weights(again), weights(unbroken))


def train_slowly(runner, monkeypatch, *, seconds):
    """Train by a clock of its own, on which every optimiser step takes so many seconds."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    apply = runner.stepper.apply

    def apply_slowly():
        apply()
        now[0] += seconds

    runner.stepper.apply = apply_slowly
    runner.train()


def test_minutes_say_when_to_save(tmp_path, monkeypatch):
    runner = toy_training.make_runner(tmp_path, save_every_minutes=1, keep_last=0)
    train_slowly(runner, monkeypatch, seconds=25)
    names = {path.name for path in runner.output_dir.glob("checkpoint_*_step*.pth")}
    assert names == {"checkpoint_0_step4.pth", "checkpoint_1_step10.pth", "checkpoint_2_step16.pth"}


def test_images_per_second_are_those_of_all_batches_of_a_step(tmp_path, monkeypatch):
    runner = toy_training.make_runner(tmp_path, accum_grad_iters=4, max_epoch=1)
    train_slowly(runner, monkeypatch, seconds=2)
    assert [record["images_per_s"] for record in records(runner, "step")] == [16, 8], "windows of 4 and 2 batches of 8"


def test_the_optimiser_and_its_schedule_are_as_the_run_says(tmp_path):
    def rates(**run):
        runner = toy_training.make_runner(tmp_path, init_lr=0.02, min_lr=0.003, **run)
        for epoch in (0, 1, 3):
            runner.lr_scheduler.step(cur_epoch=epoch, cur_step=0)
            yield runner.optimizer.param_groups[0]["lr"]

    first, _, last = rates(warmup_lr=0.004)
    assert (first, last) == (0.004, pytest.approx(0.003))
    assert list(rates(lr_sched="linear_warmup_step_lr", lr_decay_rate=0.5, warmup_steps=0)) == [0.02, 0.01, 0.003]
    run = {"muon": 3.0, "beta2": 0.9, "weight_decay": 0.2, "max_grad_norm": 0.5, "amp": "bf16"}
    runner = toy_training.make_runner(tmp_path, **run)
    assert [group["betas"] for group in runner.optimizer.adamw.param_groups] == [(0.9, 0.9)] * 2
    assert [group["weight_decay"] for group in runner.optimizer.param_groups] == [0.2, 0.2, 0]
    assert runner.optimizer.pace == 3
    assert (runner.stepper.max_grad_norm, runner.stepper.dtype) == (0.5, torch.bfloat16)


def test_muon_resumes_too_and_refuses_the_state_of_adamw(unbroken, tmp_path):
    whole = toy_training.make_runner(tmp_path, job_id="a", muon=3.0, save_every_steps=4, keep_last=0)
    whole.train()
    assert any(
        not torch.equal(whole_value, unbroken_value)
        for whole_value, unbroken_value in zip(weights(whole).values(), weights(unbroken).values(), strict=True)
    )
    path = str(whole.output_dir / "checkpoint_0_step4.pth")
    again = toy_training.make_runner(tmp_path, job_id="b", muon=3.0, resume_ckpt_path=path)
    again.train()
    assert_same(weights(again), weights(whole))
    other = toy_training.make_runner(tmp_path, job_id="c", resume_ckpt_path=path)
    with pytest.raises(UserError, match=r"checkpoint_0_step4.*run\.muon"):
        other.train()
    path = str(unbroken.output_dir / "checkpoint_0.pth")
    other = toy_training.make_runner(tmp_path, job_id="d", muon=3.0, resume_ckpt_path=path)
    with pytest.raises(UserError, match=r"checkpoint_0.*run\.muon"):
        other.train()


def test_auto_resume_passes_over_a_torn_checkpoint(unbroken, tmp_path, caplog):
    first = toy_training.make_runner(tmp_path, resume="auto")
    first.train()
    (first.output_dir / run_folder.SUMMARY).unlink()
    last = first.output_dir / "checkpoint_2.pth"
    last.write_bytes(last.read_bytes()[:-500])
    again = toy_training.make_runner(tmp_path, resume="auto")
    with caplog.at_level("WARNING"):
        again.train()
    assert again.job_id == first.job_id
    assert "truncated" in caplog.text
    assert_same(weights(again), weights(unbroken))
    assert [record["step"] for record in records(again, "step")] == list(range(1, 19))
    assert len(records(again, "eval")) == 3


def test_runs_started_in_the_same_second_have_folders_of_their_own(tmp_path):
    names = [jobs.new_job_id(tmp_path / "output") for _ in range(3)]
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == sorted(set(names))
    assert len(set(names)) == 3


def test_the_newest_run_of_the_same_configuration_is_resumed(tmp_path):
    config = {"run": {"seed": 1, "batch_size_train": 8, "num_workers": 0}, "model": {"fusion": "dual"}}
    for age, name in enumerate(("new", "old"), start=1):
        (tmp_path / name).mkdir()
        checkpoint.write(tmp_path / name / checkpoint.name_of(0), {})
        (tmp_path / name / run_folder.CONFIG).write_text(json.dumps(config))
        os.utime(tmp_path / name / run_folder.CONFIG, (100 - age, 100 - age))
    elsewhere = {**config, "run": {**config["run"], "num_workers": 4}}
    assert jobs.newest_matching(tmp_path, elsewhere) == "new"
    for section, changes in (("run", {"seed": 2}), ("run", {"batch_size_train": 4}), ("model", {"fusion": "none"})):
        other = {**config, section: {**config[section], **changes}}
        assert jobs.newest_matching(tmp_path, other) is None, changes


def test_resuming_a_finished_run_only_says_so(unbroken, tmp_path):
    first = toy_training.make_runner(tmp_path, resume="auto")
    summary = first.train()
    again = toy_training.make_runner(tmp_path, resume="auto")
    assert again.train()["steps"] == summary["steps"]
    assert_same(weights(again), weights(unbroken))
    assert len(records(again, "step")) == 18
    other = toy_training.make_runner(tmp_path, resume="auto", init_lr=1e-3)
    assert other.job_id != first.job_id


def test_a_finished_run_trains_on_where_max_epoch_has_grown(tmp_path, caplog):
    first = toy_training.make_runner(tmp_path, job_id="a", max_epoch=2)
    first.train()
    settings = {"weight_decay": 0.5, "beta2": 0.9}
    again = toy_training.make_runner(tmp_path, job_id="a", resume="auto", max_epoch=3, **settings)
    with caplog.at_level("WARNING"):
        assert again.train()["steps"] == 18
    changes = "run.beta2: None -> 0.9; run.max_epoch: 2 -> 3; run.weight_decay: 0.05 -> 0.5"
    assert f"the configuration was different: {changes}\n" in caplog.text
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.5, 0]
    assert {group["betas"] for group in again.optimizer.param_groups} == {(0.9, 0.9)}
    assert jobs.read_summary(again.output_dir)["steps"] == 18


def test_another_batch_resumes_at_an_epochs_end_or_says_why_not(unbroken, tmp_path):
    path = unbroken.output_dir / "checkpoint_0.pth"
    other = toy_training.make_runner(tmp_path, batch_size_train=10, resume_ckpt_path=str(path))
    other.train()
    assert other.state.position.steps == 6 + 2 * 4, "the epoch is done, though its 48 samples are no tens"
    first = toy_training.make_runner(tmp_path, save_every_steps=5, keep_last=0)
    first.train()
    within = str(first.output_dir / "checkpoint_0_step5.pth")
    other = toy_training.make_runner(tmp_path, batch_size_train=12, resume_ckpt_path=within)
    with pytest.raises(UserError, match=r"after 40 samples in batches of 8 .* batches of 12"):
        other.train()


def test_data_that_changed_within_an_epoch_are_told(tmp_path, caplog):
    first = toy_training.make_runner(tmp_path, save_every_steps=4, keep_last=0, max_epoch=1)
    first.train()
    within = str(first.output_dir / "checkpoint_0_step4.pth")
    toy_training.make_runner(tmp_path, max_epoch=1, resume_ckpt_path=within).train()
    toy_training.make_runner(tmp_path, max_epoch=1, resume_ckpt_path=within, batch_size_train=16).train()
    assert "its epochs had" not in caplog.text, "50 samples in batches of 8 or 16"
    toy_training.make_runner(tmp_path, max_epoch=1, resume_ckpt_path=within, length=64).train()
    assert "its epochs had 48 samples, now they have 64: are the training data" in caplog.text


def test_an_epoch_of_another_size_is_told_where_its_order_depends_on_it(tmp_path, caplog):
    first = toy_training.make_runner(tmp_path, save_every_steps=1, keep_last=0, max_epoch=1, iters_per_epoch=4)
    first.train()
    within = {"max_epoch": 1, "resume_ckpt_path": str(first.output_dir / "checkpoint_0_step1.pth")}
    toy_training.make_runner(tmp_path, **within, iters_per_epoch=8, batch_size_train=4).train()
    assert "its epochs had" not in caplog.text
    toy_training.make_runner(tmp_path, **within, iters_per_epoch=4, batch_size_train=4).train()
    assert "its epochs had 32 samples, now they have 16" in caplog.text
    within["resume_ckpt_path"] = str(first.output_dir / "checkpoint_0_step2.pth")
    shrunk = toy_training.make_runner(tmp_path, **within, iters_per_epoch=4, batch_size_train=4)
    with pytest.raises(UserError, match=r"saved after 16 of its epoch's 32 samples, .* has 16: .* set it to 8, else"):
        shrunk.train()
    assert not list(shrunk.output_dir.glob("*.pth")), "it would count as finished"


def test_a_checkpoint_of_another_model_is_no_start_of_this_run(unbroken, tmp_path):
    content = checkpoint.read(unbroken.output_dir / "checkpoint_0.pth")
    del content["model"]["words.weight"]
    torch.save({**content, "config": {**content["config"], "model": {"arch": "xformer"}}}, tmp_path / "x.pth")
    runner = toy_training.make_runner(tmp_path, resume_ckpt_path=str(tmp_path / "x.pth"))
    runner.config.config.model.arch = "xformer_opt"
    said = r"missing: words\.weight; it is of a run of xformer, this one trains xformer_opt; .* model\.pretrained\?"
    with pytest.raises(UserError, match=said):
        runner.train()


def test_a_named_checkpoint_comes_before_a_run_of_the_same_configuration(unbroken, tmp_path):
    own = toy_training.make_runner(tmp_path, max_epoch=1)
    own.train()
    path = str(unbroken.output_dir / "checkpoint_0.pth")
    again = toy_training.make_runner(tmp_path, max_epoch=2, resume="auto", resume_ckpt_path=path)
    again.train()
    assert again.output_dir != own.output_dir
    assert [record["step"] for record in records(again, "step")] == list(range(7, 13))
    once_more = toy_training.make_runner(tmp_path, max_epoch=2, resume="auto", resume_ckpt_path=path)
    assert once_more.output_dir == again.output_dir, "a restart finds its own run"


def test_a_folder_of_damaged_checkpoints_alone_is_left_as_it_is(tmp_path):
    runner = toy_training.make_runner(tmp_path, job_id="a", max_epoch=1)
    runner.train()
    for path in runner.output_dir.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    log = (runner.output_dir / "log.jsonl").read_text()
    again = toy_training.make_runner(tmp_path, job_id="a", max_epoch=1, resume="auto")
    with pytest.raises(UserError, match=r"holds only damaged checkpoints \(checkpoint_0\.pth\.bad, checkpoint_best"):
        again.train()
    assert (runner.output_dir / "log.jsonl").read_text() == log


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_in_silence(tmp_path):
    runner = toy_training.make_runner(tmp_path, max_epoch=1)
    runner.train()
    for path in runner.output_dir.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    for _ in range(2):
        again = toy_training.make_runner(tmp_path, max_epoch=1, resume="auto")
        with pytest.raises(UserError, match=r"holds only damaged checkpoints"):
            again.train()
        assert again.output_dir == runner.output_dir
    intact = toy_training.make_runner(tmp_path, max_epoch=1)
    intact.train()
    os.utime(runner.output_dir / "config.json")  # the damaged run is the newer one
    assert toy_training.make_runner(tmp_path, max_epoch=1, resume="auto").output_dir == intact.output_dir


def test_a_checkpoint_beyond_the_last_epoch_is_refused_where_nothing_is_left_to_do(unbroken, tmp_path):
    path = str(unbroken.output_dir / "checkpoint_2.pth")
    with pytest.raises(UserError, match=r"training of .*checkpoint_2\.pth has finished, as run\.max_epoch is 3"):
        toy_training.make_runner(tmp_path, resume_ckpt_path=path).train()


def test_a_finished_run_evaluates_what_is_asked_anew(tmp_path):
    first = toy_training.make_runner(tmp_path, job_id="a", max_epoch=1)
    assert first.train()["test"] == {}
    again = toy_training.make_runner(tmp_path, job_id="a", max_epoch=1, resume="auto", test_splits=["val"])
    assert list(again.train()["test"]) == ["val"]
    assert_same(weights(again), weights(first))


def test_an_evaluation_in_a_runs_folder_is_of_its_best_weights(unbroken, tmp_path, caplog):
    caplog.set_level("INFO")
    runner = toy_training.make_runner(unbroken.output_dir.parent, job_id="a", evaluate=True)
    figures = runner.train()["test"]["val"]
    assert figures["loss"] == unbroken.summary["best"]["loss"]
    assert f"evaluating the weights of {unbroken.output_dir / checkpoint.BEST}" in caplog.text
    runner = toy_training.make_runner(
        tmp_path, evaluate=True, resume_ckpt_path=str(unbroken.output_dir / checkpoint.BEST)
    )
    runner.config.config.model.fusion_heads = 4
    runner.train()
    assert "was trained with other settings of the model: " in caplog.text
    assert "model.fusion_heads: None -> 4" in caplog.text


@pytest.mark.parametrize(("named", "best"), [("start.pth", True), (None, True), ("other.pth", False)])
def test_what_a_run_started_from_is_not_what_an_evaluation_in_its_folder_asks_for(unbroken, tmp_path, named, best):
    folder = tmp_path / "a"
    shutil.copytree(unbroken.output_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["pretrained"] = "start.pth"
    (folder / "config.json").write_text(json.dumps(config))
    runner = toy_training.make_runner(tmp_path, job_id="a", evaluate=True)  # of new weights
    runner.config.config.model.pretrained = named
    assert (runner.train()["test"]["val"]["loss"] == unbroken.summary["best"]["loss"]) is best


def test_a_warm_up_as_long_as_the_run_is_told(tmp_path, caplog):
    toy_training.make_runner(tmp_path, max_epoch=1, warmup_steps=6).train()
    assert "run.warmup_steps is 6 of 6: the learning rate never reaches run.init_lr" in caplog.text


def test_scores_that_cannot_be_written_cost_only_themselves(unbroken, tmp_path, monkeypatch, caplog):
    def full(path, content):
        raise OSError("Read-only file system")

    monkeypatch.setattr(tasks_base, "write_json", full)
    path = str(unbroken.output_dir / checkpoint.BEST)
    assert "val" in toy_training.make_runner(tmp_path, evaluate=True, resume_ckpt_path=path).train()["test"]
    assert "the per-item scores can't be written: Read-only file system; continuing" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"run\.output_dir: nothing can be written in .*gone: No such file"):
        jobs.claim(tmp_path / "gone")


def test_a_checkpoint_of_laviss_runner_goes_on_with_the_next_epoch(unbroken, tmp_path):
    content = checkpoint.read(unbroken.output_dir / "checkpoint_0.pth")
    torch.save({key: content[key] for key in ("model", "optimizer", "scaler", "epoch", "config")}, tmp_path / "x.pth")
    runner = toy_training.make_runner(tmp_path, resume_ckpt_path=str(tmp_path / "x.pth"))
    runner.train()
    assert [record["step"] for record in records(runner, "step")] == list(range(7, 19))


def test_a_run_of_one_process_goes_on_in_two_where_it_was(tmp_path, monkeypatch):
    runner = toy_training.make_runner(tmp_path)
    monkeypatch.setattr(state, "world_size", lambda: 2)
    content = {"position": {"batches": 4, "steps": 4}, "joined_batch": 8, "epoch_done": False}
    position = runner.state._restored_position(content, "x.pth")
    assert (position.batches, position.steps) == (2, 4), "of 16 samples each"


def test_averages_best_scale_and_skipped_samples_go_on_after_a_restart(unbroken, tmp_path):
    content = checkpoint.read(unbroken.output_dir / "checkpoint_0.pth")
    content |= {"corrupt": ["a.jpg"], "corrupt_count": 3, "best": {"epoch": 0}, "scaler": {"scale": 8.0}}
    runner, scales = toy_training.make_runner(tmp_path), []
    runner.state.scaler = SimpleNamespace(load_state_dict=scales.append)
    runner.state.restore(content, source="x.pth")
    assert (scales, runner.state.best) == ([{"scale": 8.0}], {"epoch": 0})
    assert vars(runner.state.averages) == content["averages"] != vars(Averages())
    runner.state.next_epoch()
    assert runner.state.averages == Averages()
    runner.state.corrupt.update(["b.jpg"])
    assert (runner.state.corrupt.names, runner.state.corrupt.count) == (["a.jpg", "b.jpg"], 4)


def test_the_last_partial_window_is_used(tmp_path):
    runner = toy_training.make_runner(tmp_path, accum_grad_iters=4, max_epoch=2)
    runner.train()
    rates = [record["lr"] for record in records(runner, "step")]  # 6 batches: windows of 4 and 2, twice
    assert rates == pytest.approx([0, 0.005, 0.01, 0.015]), "a step of the warm-up is one of the optimiser"


def test_a_loss_that_is_not_finite_names_term_step_and_images(tmp_path):
    runner = toy_training.make_runner(tmp_path, broken=[7])
    with pytest.raises(UserError, match=r"not finite in step \d+ of epoch 0: rank 0: .*loss_itc.*'i3'"):
        runner.train()
    (bundle,) = runner.output_dir.glob("nonfinite_*.pt")
    content = torch.load(bundle, weights_only=True)
    assert any("i3" in samples["image_id"] for samples in content["window"])
    assert all(value.isfinite().all() for value in content["model"].values())


def test_a_full_disk_does_not_keep_it_from_saving_what_was_trained(tmp_path, monkeypatch):
    def full_disk(content, path):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    runner = toy_training.make_runner(tmp_path, broken=[7])
    monkeypatch.setattr("lavis_xformer.engine.loop.torch.save", full_disk)
    monkeypatch.setattr(runner, "_save_checkpoint", lambda: checkpoints.append(runner.state.position.steps))
    checkpoints = []
    with pytest.raises(UserError, match=r"random state are in no file \(see the warning above\)"):
        runner.train()
    assert len(checkpoints) == 1


def test_what_was_trained_before_it_is_saved_and_repeats_or_skips_it(tmp_path):
    skipping = toy_training.make_runner(tmp_path / "skips", broken=[7], skip_nonfinite=9)
    skipping.train()
    step = next(record["step"] for record in records(skipping, "step") if "nan" in record.values())
    assert 1 < step <= 6, "else there was nothing to save in the first epoch"
    for _ in range(2):
        runner = toy_training.make_runner(tmp_path, broken=[7], resume="auto")
        with pytest.raises(UserError, match=f"not finite in step {step} of epoch 0: .*'i3'"):
            runner.train()
        assert [path.name for path in checkpoint.listed(runner.output_dir)] == [f"checkpoint_0_step{step - 1}.pth"]
    again = toy_training.make_runner(tmp_path, broken=[7], resume="auto", skip_nonfinite=9)
    assert again.train()["skipped"] == 3
    assert_same(weights(again), weights(skipping))


def test_figures_of_numpy_and_torch_leave_the_checkpoints_readable(tmp_path, monkeypatch):
    runner = toy_training.make_runner(tmp_path, test_splits=["val"])
    monkeypatch.setattr(
        runner.task, "after_evaluation", lambda **_: {"agg_metrics": np.float64(1.5), "CIDEr": torch.tensor(0.5)}
    )
    assert runner.train()["best"] == {"epoch": 0, "split": "val", "agg_metrics": 1.5, "CIDEr": 0.5}
    for path in runner.output_dir.glob("*.pth"):
        assert checkpoint.read(path)["model"]


def test_two_processes_dont_train_in_one_folder(tmp_path):
    def hold():
        lock = jobs.claim(tmp_path / "a")
        theirs.send(lock is not None)
        theirs.recv()

    forks = multiprocessing.get_context("fork")
    ours, theirs = forks.Pipe()
    runner = toy_training.make_runner(tmp_path, job_id="a", max_epoch=1)
    other = forks.Process(target=hold, daemon=True)
    other.start()
    assert ours.poll(60)
    assert ours.recv()
    with pytest.raises(UserError, match=r"another process is training in .*/a: wait for it or stop it"):
        runner.train()
    ours.send("leave")
    other.join(60)
    assert other.exitcode == 0
    assert runner.train()["finished"]


def test_such_steps_may_be_skipped(tmp_path):
    runner = toy_training.make_runner(tmp_path, broken=[7], skip_nonfinite=3)
    assert runner.train()["skipped"] == 3
    assert all(value.isfinite().all() for value in weights(runner).values())
    assert torch.isfinite(torch.tensor(runner.state.best["loss"]))


@pytest.fixture
def terminal():
    """A process that a closed terminal ends, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_the_step_and_the_restart_ends_the_same(unbroken, tmp_path, sent, code):
    runner = toy_training.make_runner(tmp_path, resume="auto")
    signal_in_step(runner, 8, lambda: signal.raise_signal(sent))
    with pytest.raises(SystemExit) as left:
        runner.train()
    assert left.value.code == code
    assert (runner.output_dir / "checkpoint_1_step10.pth").exists()
    again = toy_training.make_runner(tmp_path, resume="auto")
    again.train()
    assert_same(weights(again), weights(unbroken))


@pytest.mark.usefixtures("terminal")
def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    runner = toy_training.make_runner(tmp_path, max_epoch=1)
    signal_in_step(runner, 2, lambda: signal.raise_signal(signal.SIGHUP))
    assert runner.train()["finished"]


def test_the_same_signal_twice_at_once_still_saves_the_step(tmp_path):
    runner = toy_training.make_runner(tmp_path)
    signal_in_step(runner, 2, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
    with pytest.raises(SystemExit) as left:
        runner.train()
    assert left.value.code == 143
    assert (runner.output_dir / "checkpoint_0_step4.pth").exists()


def test_evaluation_repeats_itself_and_leaves_the_training_alone(unbroken):
    before = rng.capture()["torch"]
    figures = [unbroken.eval_epoch("val", 2) for _ in range(2)]
    assert figures[0] == figures[1]
    assert torch.equal(rng.capture()["torch"], before)


def test_evaluation_drops_nothing_out(unbroken, monkeypatch):
    figures = unbroken.eval_epoch("val", 2)
    monkeypatch.setattr(unbroken.state.model.image[1], "p", 0.9)
    unbroken.model.train()
    assert unbroken.eval_epoch("val", 2) == figures


def test_the_best_epoch_is_that_of_the_split_val_and_its_weights_are_tested(tmp_path, monkeypatch):
    data = {split: toy_training.ToyPairs(16, augmented=False) for split in ("other", "val")}
    datasets = {"toy": {"train": toy_training.ToyPairs(), **data}}
    runner = toy_training.make_runner(
        tmp_path, datasets=datasets, valid_splits=["other", "val"], test_splits=["val"], max_epoch=2
    )

    def after_evaluation(val_result, split_name, epoch):
        return {"agg_metrics": {"other": 9.0, "val": float(epoch != 1)}[split_name], "loss": val_result["loss"]}

    monkeypatch.setattr(runner.task, "after_evaluation", after_evaluation)
    summary = runner.train()
    assert (summary["best"]["epoch"], summary["best"]["split"]) == (0, "val")
    assert summary["test"]["val"]["loss"] == summary["best"]["loss"]
    first, second = (record["loss"] for record in records(runner, "eval") if record["split"] == "val")
    assert first != second


def test_an_epoch_that_could_not_be_saved_is_not_the_best(tmp_path, monkeypatch):
    runner, write = toy_training.make_runner(tmp_path), checkpoint.write

    def full_once(path, content):
        if path.name == checkpoint.name_of(1):
            raise OSError("no space")
        write(path, content)

    def after_evaluation(epoch, **unused):
        return {"agg_metrics": [1.0, 9.0, 0.0][epoch]}

    monkeypatch.setattr(checkpoint, "write", full_once)
    monkeypatch.setattr(runner.task, "after_evaluation", after_evaluation)
    assert runner.train()["best"]["epoch"] == 0
    assert checkpoint.read(runner.output_dir / checkpoint.BEST)["epoch"] == 0


def test_training_and_evaluation_have_batches_of_their_own_size(tmp_path):
    loaders = toy_training.make_runner(tmp_path, batch_size_train=4, batch_size_eval=6).dataloaders
    sizes = {split: len(next(iter(loader))["text_input"]) for split, loader in loaders.items()}
    assert sizes == {"train": 4, "val": 6}


def test_evaluating_only_gives_the_figures_of_the_training(unbroken, tmp_path, capsys):
    best = str(unbroken.output_dir / checkpoint.BEST)
    runner = toy_training.make_runner(tmp_path, evaluate=True, resume_ckpt_path=best)
    summary = runner.train()
    figures = summary["test"]["val"]
    assert {name: unbroken.summary["best"][name] for name in figures} == figures
    assert not list(runner.output_dir.glob("*.pth"))
    rows = {name: by for name, _, by in runner.task.table(figures)}
    assert rows["ITM accuracy %"] == "66.7"
    assert float(rows["text to image R@1 %"]) == pytest.approx(100 / 9, abs=0.1)
    (runner.output_dir / "result").mkdir(exist_ok=True)
    (runner.output_dir / "result" / "val_toy.json").write_text("{}")
    conclude.conclude(runner, {**summary, "test": {"val": figures, "hidden": None}})
    said = capsys.readouterr().out
    assert "val:\n" in said
    assert "hidden" not in said, "a test split without truths has no figures"
    assert f"{runner.output_dir.name}/log.txt" in said
    assert f"{runner.output_dir.name}/result" in said


def test_checkpoints_of_another_run_are_not_mixed_with_new_ones(unbroken):
    again = toy_training.make_runner(unbroken.output_dir.parent, job_id="a")
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        again.train()
    path = str(unbroken.output_dir / "checkpoint_0.pth")
    again = toy_training.make_runner(unbroken.output_dir.parent, job_id="a", resume_ckpt_path=path)
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        again.train()


def test_a_run_from_another_folders_checkpoint_chooses_its_own_best(unbroken, tmp_path):
    path = unbroken.output_dir / "checkpoint_2.pth"
    content = checkpoint.read(path)
    content["best"] = {"epoch": 0, "split": "val", "agg_metrics": 1e9}
    checkpoint.write(tmp_path / "good.pth", content)
    runner = toy_training.make_runner(
        tmp_path, job_id="b", resume_ckpt_path=str(tmp_path / "good.pth"), max_epoch=4, test_splits=["val"]
    )
    summary = runner.train()
    assert summary["best"]["epoch"] in (2, 3)
    assert summary["best"]["agg_metrics"] == summary["test"]["val"]["agg_metrics"]
    assert [record["epoch"] for record in records(runner, "test")] == [summary["best"]["epoch"]]
    assert (runner.output_dir / checkpoint.BEST).exists()


def test_without_validation_the_last_weights_are_the_best(tmp_path):
    runner = toy_training.make_runner(tmp_path, valid_splits=[], max_epoch=2)
    assert runner.train()["best"] == {}
    best, last = (checkpoint.read(runner.output_dir / name) for name in (checkpoint.BEST, "checkpoint_1.pth"))
    assert best["position"] == last["position"]
    assert_same(best["model"], last["model"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"valid_splits": ["vall"]}, r"run\.valid_splits: 'vall'; did you mean 'val'\?"),
        ({"test_splits": ["tset"]}, r"run\.test_splits: 'tset'; "),
        ({"train_splits": []}, r"run\.train_splits is \[\]; to train, it must be \[train\]"),
        ({"train_splits": ["train", "val"]}, r"run\.train_splits is \['train', 'val'\]"),
        ({"valid_splits": ["train"]}, r"run\.valid_splits: 'train' is trained on, .* lavis\.evaluate"),
    ],
)
def test_splits_are_checked_before_the_first_step(tmp_path, run, message):
    with pytest.raises(UserError, match=message):
        toy_training.make_runner(tmp_path, **run)


def test_a_split_without_captions_is_refused_before_the_first_step(tmp_path):
    class Images(toy_training.ToyPairs):
        def __getitem__(self, index):
            return {"image": super().__getitem__(index)["image"]}

    data = {"toy": {"train": toy_training.ToyPairs(), "val": Images(16)}}
    runner = toy_training.make_runner(tmp_path, datasets=data)
    with pytest.raises(UserError, match=r"the split 'val' has no captions .* run\.valid_splits"):
        runner.train()
    assert not list(runner.output_dir.glob("*.jsonl"))


@pytest.mark.parametrize("native", [True, False])
def test_mixed_precision_that_the_processor_only_emulates_is_told(native, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lavis_xformer.runners.xformer.computes_bf16", lambda device: native)
    runner = toy_training.make_runner(tmp_path, amp="bf16")
    with caplog.at_level("INFO"):
        runner._announce()
    assert "mixed precision: bf16" in caplog.text
    assert ("run.amp=auto avoids it" in caplog.text) is not native


def test_nothing_left_to_train_still_concludes(unbroken, tmp_path, capsys):
    path = str(unbroken.output_dir / "checkpoint_2.pth")
    runner = toy_training.make_runner(tmp_path, resume_ckpt_path=path, test_splits=["val"])
    conclude.conclude(runner, runner.train())
    said = capsys.readouterr().out
    assert "log         " in said
    assert "curves" not in said


def test_a_full_disk_at_the_end_costs_the_report_alone(unbroken, capsys, monkeypatch):
    def _full(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(conclude, "write_report", _full)
    conclude.conclude(unbroken, unbroken.summary)
    said = capsys.readouterr().out
    assert "checkpoint  " in said
    assert "report      can't be written: No space left on device" in said


def test_evaluation_checks_all_splits_before_it_begins(tmp_path):
    with pytest.raises(UserError, match=r"run\.test_splits: 'tset'; "):
        toy_training.make_runner(tmp_path, evaluate=True, train_splits=["nil"], test_splits=["val", "tset"])


def test_an_evaluation_needs_no_batch_of_training_data(tmp_path):
    few = {"toy": {"train": toy_training.ToyPairs(1), "val": toy_training.ToyPairs(16)}}
    runner = toy_training.make_runner(tmp_path, datasets=few, evaluate=True, valid_splits=["val"], test_splits=[])
    assert list(runner.train()["test"]) == ["val"]
    assert list(runner.dataloaders) == ["val"]
    with pytest.raises(UserError, match="has only 1 samples"):
        toy_training.make_runner(tmp_path / "trains", datasets=few).train()


def test_a_split_of_two_datasets_cant_be_evaluated(tmp_path):
    parts = {name: {split: toy_training.ToyPairs(16) for split in ("train", "val")} for name in ("a", "b")}
    with pytest.raises(UserError, match=r"a and b each have a split 'val'.*datasets\.b\..*annotations\.val=null"):
        toy_training.make_runner(tmp_path, datasets=parts)


def test_a_task_of_lavis_trains_too_and_tells_its_model_how_far_it_is(tmp_path, monkeypatch):
    seen, forward = [], toy_training.ToyModel.forward

    def watched(model, samples):
        seen.append((samples["epoch"], samples["num_iters_per_epoch"], samples["iters"]))
        return forward(model, samples)

    monkeypatch.setattr(toy_training.ToyModel, "forward", watched)
    runner = toy_training.make_runner(tmp_path, task="image_text_pretrain")
    summary = runner.train()
    assert seen == [(epoch, 6, batch) for epoch in range(3) for batch in range(6)]
    assert summary["best"] == {}
    assert (runner.output_dir / checkpoint.BEST).exists()
    assert records(runner, "step")[-1]["loss"] < records(runner, "step")[0]["loss"]


def test_wandb_has_to_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        toy_training.make_runner(tmp_path, wandb=True).train()


def test_the_report_is_one_page_with_its_picture(unbroken):
    page, picture = report.write_report(unbroken.output_dir)
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "i2t_r1" in text
    assert not re.search(r"(src|href)=.?http|url\(|@import", text), "nothing is fetched"
    with Image.open(picture) as image:
        assert min(image.size) > 400


def test_a_curve_is_smoothed_by_its_neighbours_on_both_sides():
    values = [0.0, 0.0, 6.0, 0.0, 0.0, 3.0]
    assert report.smooth(values, share=0.4) == [0, 2, 2, 2, 1, 1.5]
    assert report.smooth(values) == values


def test_a_folder_without_a_log_has_no_report(tmp_path):
    with pytest.raises(UserError, match=r"no log\.jsonl"):
        report.write_report(tmp_path)


def test_lines_of_a_log_that_are_no_records_are_skipped(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'\xff\x00\n[1]\n"x"\n{"step": 1}\n{"kind": "st')
    assert run_folder.read_log(tmp_path) == []
    with pytest.raises(UserError, match=r"log\.jsonl has no training step yet"):
        report.write_report(tmp_path)


def test_a_report_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "step", "step": 1, "loss": 1.0}')
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        report.main([str(tmp_path)])
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UserError, match=r"the report can't be written: .*curves\.png"):
        report.main([str(tmp_path)])


def test_an_evaluation_of_untrained_weights_says_so(unbroken, tmp_path, caplog):
    for named in (str(unbroken.output_dir / "checkpoint_0.pth"), None):
        runner = toy_training.make_runner(tmp_path, evaluate=True, resume_ckpt_path=named)
        runner.model.untrained = "all"
        assert "weights are evaluated that were never trained" not in caplog.text
        runner.train()
    assert "weights are evaluated that were never trained: all" in caplog.text


def test_a_named_checkpoint_comes_before_a_run_of_the_very_same_configuration(unbroken, tmp_path):
    own = toy_training.make_runner(tmp_path, max_epoch=2)
    own.train()
    path = str(unbroken.output_dir / "checkpoint_0.pth")
    again = toy_training.make_runner(tmp_path, max_epoch=2, resume="auto", resume_ckpt_path=path)
    assert again.output_dir != own.output_dir


@pytest.mark.parametrize("change", [{"max_grad_norm": 1.0}, {"seed": 2}, {"init_lr": 1e-2}, {"accum_grad_iters": 2}])
def test_a_run_that_computes_something_else_is_not_resumed(tmp_path, change):
    own = toy_training.make_runner(tmp_path, max_epoch=1)
    own.train()
    assert toy_training.make_runner(tmp_path, max_epoch=1, resume="auto").output_dir == own.output_dir
    assert toy_training.make_runner(tmp_path, max_epoch=1, resume="auto", **change).output_dir != own.output_dir


def test_a_finished_run_that_trains_on_is_finished_no_more(tmp_path):
    toy_training.make_runner(tmp_path, job_id="a", max_epoch=1).train()
    again = toy_training.make_runner(tmp_path, job_id="a", max_epoch=2, resume="auto")
    seen = []
    signal_in_step(again, 7, lambda: seen.append(jobs.read_summary(again.output_dir)))
    again.train()
    assert seen == [None]


def test_the_runs_seed_is_that_of_its_evaluations(tmp_path):
    def drawn(seed):
        runner = toy_training.make_runner(tmp_path, seed=seed)
        runner.task.evaluation = lambda model, loader, cuda_enabled: torch.rand(1).item()
        runner.task.after_evaluation = lambda val_result, split_name, epoch: {"agg_metrics": val_result}
        return runner.eval_epoch("val", 0)

    assert drawn(1) == drawn(1) != drawn(2)


def test_checking_the_splits_leaves_the_random_state_alone(tmp_path):
    runner = toy_training.make_runner(tmp_path)
    runner.task.check_split = lambda name, dataset: dataset[0]  # draws
    assert runner.dataloaders
    before = torch.get_rng_state()
    runner.check_splits_to_come()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_splits_to_test_are_checked_before_the_first_step_too(tmp_path):
    runner, checked = toy_training.make_runner(tmp_path, valid_splits=[], test_splits=["val"]), []
    runner.task.check_split = lambda name, dataset: checked.append(name)
    runner.check_splits_to_come()
    assert checked == ["val"]


def test_the_file_of_a_step_that_is_not_finite_holds_the_random_state_before_it(tmp_path):
    runner = toy_training.make_runner(tmp_path, job_id="a", broken=range(48))
    gradients, before = runner.stepper.gradients, []
    runner.stepper.gradients = lambda window: before.append(rng.capture()) or gradients(window)
    with pytest.raises(UserError, match="not finite in step 1"):
        runner.train()
    saved = torch.load(next(runner.output_dir.glob("nonfinite_*.pt")), weights_only=True)
    assert torch.equal(saved["rng"]["torch"], before[0]["torch"])
    assert not list(runner.output_dir.glob("*.pth")), "nothing was trained"


def test_an_epoch_of_fewer_samples_is_told_where_its_batches_are_counted(tmp_path, caplog):
    steps = {"iters_per_epoch": 6, "save_every_steps": 2, "keep_last": 0}
    toy_training.make_runner(tmp_path, job_id="a", max_epoch=1, **steps).train()
    start = {"max_epoch": 1, "batch_size_train": 4, "resume_ckpt_path": str(tmp_path / "a" / "checkpoint_0_step2.pth")}
    toy_training.make_runner(tmp_path, job_id="b", iters_per_epoch=12, **start).train()
    assert "its epochs had" not in caplog.text
    toy_training.make_runner(tmp_path, job_id="c", iters_per_epoch=11, **start).train()
    assert "its epochs had 48 samples, now they have 44" in caplog.text


def test_the_checkpoint_that_a_run_ends_with_is_its_best(unbroken, capsys):
    conclude.conclude(unbroken, unbroken.summary)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint ")]
    assert line.endswith(checkpoint.BEST)
