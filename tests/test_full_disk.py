"""A file system that fills up while training: nothing saved is lost, and the exit status says what is missing."""

from __future__ import annotations

import subprocess

import pytest
import toy_training

from lavis_xformer import cli
from lavis_xformer.engine import checkpoint, jobs


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def fill(folder):
    with open(folder / "filling", "wb", buffering=0) as file:
        for size in (4096, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break


def test_a_disk_that_fills_up_loses_nothing_and_is_told(small_disk, capsys):
    undisturbed = toy_training.make_runner(small_disk, job_id="a")
    undisturbed.train()
    runner = toy_training.make_runner(small_disk, job_id="b")
    save = runner._save_checkpoint

    def save_then_fill():
        save()
        if runner.state.position.epoch == 1:
            fill(small_disk)

    runner._save_checkpoint = save_then_fill
    assert cli.run(lambda argv: runner.train(), []) == 2
    said = capsys.readouterr()
    assert "checkpoint_2.pth could not be written" in said.err.splitlines()[-1]
    left = checkpoint.listed(runner.output_dir)
    assert [path.name for path in left] == ["checkpoint_1.pth", "checkpoint_0.pth"]
    assert not any(checkpoint.damage(path) for path in left)
    assert jobs.read_summary(runner.output_dir) is None

    (small_disk / "filling").unlink()
    again = toy_training.make_runner(small_disk, job_id="b", resume="auto")
    assert again.train()["finished"]
    last = [checkpoint.read(r.output_dir / "checkpoint_2.pth")["model"] for r in (undisturbed, again)]
    assert all(last[0][name].equal(last[1][name]) for name in last[0])
