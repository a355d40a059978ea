"""Training on a GPU through the runner: every precision learns and resumes; both shipped jobs, one after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_training

from lavis_xformer.run_folder import read_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
PROJECTS = Path(__file__).parents[1] / "projects" / "xformer"
SMALL = (
    "run.device=cuda run.amp=auto run.max_epoch=1 run.warmup_steps=1 run.num_workers=2 "
    "datasets.xformer_scenes.splits.val.scenes=64"
).split()


def losses(folder: Path) -> list[float]:
    """Of the training's steps, in order."""
    return [record["loss"] for record in read_log(folder) if record["kind"] == "step"]


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_every_precision_learns_and_resumes_to_the_bit(amp: str, tmp_path: Path) -> None:
    run = {"device": "cuda", "amp": amp, "save_every_steps": 4, "keep_last": 0, "num_workers": 2}
    whole = toy_training.make_runner(tmp_path, job_id="whole", **run)
    whole.train()
    assert next(whole.model.parameters()).is_cuda
    said = losses(whole.output_dir)
    assert said[-1] < 0.8 * said[0]
    start = str(whole.output_dir / "checkpoint_0_step4.pth")
    again = toy_training.make_runner(tmp_path, job_id="again", resume_ckpt_path=start, **run)
    again.train()
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(again.state.model.state_dict()[name], value), name


def train(folder: Path, project: str, *options: str) -> Path:
    """Run a shipped job under torchrun; its folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "lavis.train"]
    command += ["--cfg-path", str(PROJECTS / project), "--options", *SMALL, f"run.output_dir={folder}", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (best,) = folder.glob("*/checkpoint_best.pth")
    return best.parent


def test_stage_1_then_stage_2(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("stage1", "stage2")]
    for folder in folders:
        folder.mkdir()
    scenes = "datasets.xformer_scenes.splits.train.scenes"
    stage1 = train(folders[0], "pretrain.yaml", f"{scenes}=640")
    questions = "datasets.xformer_scenes_vqa.splits"
    splits = [f"{scenes}=80", f"{questions}.train.scenes=240", f"{questions}.val.scenes=16"]
    stage2 = train(folders[1], "pretrain_stage2.yaml", *splits, f"model.pretrained={stage1 / 'checkpoint_best.pth'}")
    for folder in (stage1, stage2):
        said = losses(folder)
        assert len(said) == 20
        assert said[-1] < said[0]
