"""Killed at random moments, again and again, a run ends with the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("toy_training.py")
KILLS = 20
OPTIONS = ("job_id=x", "resume=auto", "max_epoch=10", "save_every_steps=1", "delay=0.01")


def start(folder):
    command = [sys.executable, str(SCRIPT), f"output_dir={folder}", *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_training(process):
    """Read the output until the last line before the first step."""
    for line in process.stdout:
        if line.startswith("output "):
            return


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path):
    undisturbed = start(tmp_path / "a")
    undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0
    moments = random.Random(0)
    for number in range(KILLS):
        process = start(tmp_path / "b")
        wait_for_training(process)
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None, f"ended before kill {number}"
        process.kill()
        process.communicate()
    last = start(tmp_path / "b")
    last.communicate(timeout=300)
    assert last.returncode == 0
    left, right = (torch.load(tmp_path / run / "x" / "final0.pt", weights_only=True) for run in "ab")
    assert all(torch.equal(left[name], right[name]) for name in left)
