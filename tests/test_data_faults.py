"""Bad samples, a dataset that vanishes and a worker that dies, seen from the runner; LAVIS's own datasets."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_training
from lavis.datasets.datasets.caption_datasets import CaptionDataset
from PIL import Image
from torch.utils.data import dataloader

from lavis_xformer import cli
from lavis_xformer.conclude import print_corrupt
from lavis_xformer.data.guard import guard
from lavis_xformer.engine import checkpoint, jobs
from lavis_xformer.errors import UserError


def to_vector(image):
    return torch.tensor(image.getpixel((0, 0)) + (1,) * 5, dtype=torch.float32) / 255


def photos(folder, count=24, bad=()):
    """LAVIS's caption dataset of tiny photos, the bad ones cut in half."""
    folder.mkdir(parents=True)
    rows = [{"image": f"{i}.png", "caption": f"c{i % 4}", "image_id": f"{folder.name}{i}"} for i in range(count)]
    for i in range(count):
        Image.new("RGB", (8, 8), (60 * (i % 4), i, 9)).save(folder / f"{i}.png")
    for i in bad:
        path = folder / f"{i}.png"
        path.write_bytes(path.read_bytes()[:40])
    (folder / "rows.json").write_text(json.dumps(rows))
    return CaptionDataset(to_vector, str, str(folder), [str(folder / "rows.json")])


def make_runner(folder, train, val=(), **run):
    splits = {"one": {"train": train[0]}, **{f"more{i}": {"train": part} for i, part in enumerate(train[1:])}}
    splits["one"]["val"] = val or toy_training.ToyPairs(8, augmented=False)
    return toy_training.make_runner(folder / "output", datasets=splits, **{"max_epoch": 2, **run})


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_names_and_counts_bad_photos_of_several_datasets(tmp_path, workers, capsys):
    parts = [photos(tmp_path / "a", bad=[3]), photos(tmp_path / "b", bad=[0, 7])]
    runner = make_runner(tmp_path, parts, num_workers=workers)
    summary = runner.train()
    names = [f"{tmp_path}/a/3.png (sample 3)", f"{tmp_path}/b/0.png (sample 0)", f"{tmp_path}/b/7.png (sample 7)"]
    assert summary["corrupt"] == names
    assert jobs.read_summary(runner.output_dir)["corrupt"] == names
    log = [json.loads(line) for line in (runner.output_dir / "log.jsonl").read_text().splitlines()]
    assert [record["corrupt_samples"] for record in log if record["kind"] == "epoch"] == [3, 3]
    assert checkpoint.read(runner.output_dir / "checkpoint_1.pth")["corrupt"] == names
    capsys.readouterr()  # what the training has said
    print_corrupt(names, 3)
    assert capsys.readouterr().out.startswith(f"\n3 corrupt samples skipped: {names[0]}, ")


@pytest.mark.parametrize("workers", [0, 2])
def test_or_stops_with_the_photos_name_when_asked_to(tmp_path, workers):
    runner = make_runner(tmp_path, [photos(tmp_path / "a", bad=[3])], on_corrupt="raise", num_workers=workers)
    with pytest.raises(UserError, match=r"a/3\.png \(sample 3\): "):
        runner.train()


def test_a_dataset_with_its_own_guard_keeps_it_and_is_counted(tmp_path):
    parts = [guard(photos(tmp_path / "a", bad=[3])), photos(tmp_path / "b")]
    assert make_runner(tmp_path, parts, on_corrupt="raise").train()["corrupt"] == [f"{tmp_path}/a/3.png (sample 3)"]
    parts = [guard(photos(tmp_path / "c", bad=[3]), on_corrupt="raise"), photos(tmp_path / "d")]
    with pytest.raises(UserError, match=r"c/3\.png"):
        make_runner(tmp_path, parts, job_id="second", on_corrupt="skip").train()


def test_evaluation_stops_unless_told_to_skip(tmp_path):
    train, val = photos(tmp_path / "a"), photos(tmp_path / "v", count=8, bad=[5])
    runner = make_runner(tmp_path, [train], val)
    with pytest.raises(UserError, match=r"v/5\.png \(sample 5\): "):
        runner.train()
    assert (runner.output_dir / "checkpoint_0.pth").exists()
    summary = make_runner(tmp_path, [train], val, on_corrupt="skip", resume="auto").train()
    assert summary["corrupt"] == [f"{tmp_path}/v/5.png (sample 5)"]
    once = make_runner(tmp_path, [train], val, on_corrupt="skip", job_id="once", max_epoch=1).train()
    assert once["corrupt"] == summary["corrupt"], "those of the last evaluation count too"
    asked = make_runner(tmp_path, [train], val, on_corrupt="skip", job_id="asked", evaluate=True).train()
    assert (asked["corrupt"], asked["corrupt_count"]) == (summary["corrupt"], 1)
    with pytest.raises(UserError, match=r"run\.on_corrupt is 'ignore'; it must be one of skip, raise"):
        make_runner(tmp_path, [train], on_corrupt="ignore")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_vanishes_ends_in_one_line_and_a_checkpoint(tmp_path, workers, capsys):
    runner = make_runner(tmp_path, [photos(tmp_path / "a", count=64)], num_workers=workers)
    after_steps(runner, 2, lambda: shutil.rmtree(tmp_path / "a"))
    assert cli.run(lambda argv: runner.train(), []) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "error: 32 bad samples in a row, the last one" in last_line
    assert "a/" in last_line
    (path,) = runner.output_dir.glob("checkpoint_*.pth")
    assert checkpoint.read(path)["position"]["batches"] >= 2


def test_a_worker_that_is_killed_ends_in_one_line_and_a_checkpoint(tmp_path):
    options = [f"output_dir={tmp_path}", "job_id=a", "length=4800", "delay=0.01", "num_workers=1", "log_freq=1"]
    process = subprocess.Popen(
        [sys.executable, toy_training.__file__, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    next(line for line in process.stdout if line.startswith("epoch 0 2/"))
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: a data worker died or timed out" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    (path,) = (tmp_path / "a").glob("checkpoint_*.pth")
    assert checkpoint.read(path)["position"]["batches"] >= 2


def test_a_worker_that_dies_during_a_step_spares_the_step(tmp_path, capsys):
    runner = toy_training.make_runner(tmp_path, length=800, delay=0.02, num_workers=1)
    others = multiprocessing.active_children()

    def kill_worker():
        (worker,) = [child for child in multiprocessing.active_children() if child not in others]
        worker.kill()
        worker.join(timeout=10)

    after_steps(runner, 2, kill_worker)
    assert cli.run(lambda argv: runner.train(), []) == 2
    assert "error: a data worker died or timed out" in capsys.readouterr().err
    (path,) = runner.output_dir.glob("checkpoint_*.pth")
    assert checkpoint.read(path)["position"]["batches"] >= 2


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_gone_too(tmp_path, capsys, monkeypatch, error):
    """Then the pipe tells first, and torch does not know yet that the worker is dead."""
    runner = toy_training.make_runner(tmp_path, length=80)

    def torn(self):
        raise error

    after_steps(runner, 2, lambda: monkeypatch.setattr(dataloader._SingleProcessDataLoaderIter, "_next_data", torn))
    assert cli.run(lambda argv: runner.train(), []) == 2
    assert "error: a data worker died or timed out" in capsys.readouterr().err
    (path,) = runner.output_dir.glob("checkpoint_*.pth")
    assert checkpoint.read(path)["position"]["batches"] == 2


def after_steps(runner, count, act):
    """Call ``act`` once when so many steps have been trained."""
    apply = runner.stepper.apply

    def apply_then_act():
        apply()
        if runner.state.position.steps == count - 1:
            act()

    runner.stepper.apply = apply_then_act
