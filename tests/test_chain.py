"""The quickstart's way, command by command: stage 1, stage 2 from it, export, and all that a user asks of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lavis_xformer
from lavis_xformer import cli

PROJECTS = Path(__file__).parents[1] / "projects" / "xformer"
SMALL = (
    "run.max_epoch=1 run.warmup_steps=1 run.batch_size_train=16 datasets.xformer_scenes.splits.train.scenes=64".split()
)


def train(folder: Path, project: str, *options: str) -> Path:
    """Run ``python -m lavis.train`` as documented; its best checkpoint."""
    command = [
        sys.executable,
        "-m",
        "lavis.train",
        "--cfg-path",
        str(PROJECTS / project),
        "--options",
        *SMALL,
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (best,) = (folder / "output" / "xformer" / Path(project).stem).glob("*/checkpoint_best.pth")
    assert str(best.parent) in done.stdout, "the last lines say where everything is"
    if project == "pretrain.yaml":
        assert f"model.fusion=dual model.pretrained={best.relative_to(folder)}" in done.stdout, "and what comes next"
    return best


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of both stages, trained one after the other."""
    folder = tmp_path_factory.mktemp("chain")
    val = "datasets.xformer_scenes.splits.val.scenes=16"
    stage1 = train(folder, "pretrain.yaml", val)
    questions = "datasets.xformer_scenes_vqa.splits"
    vqa = [f"{questions}.train.scenes=64", f"{questions}.val.scenes=8"]
    stage2 = train(folder, "pretrain_stage2.yaml", val, *vqa, f"model.pretrained={stage1}")
    for name, checkpoint in (("stage1", stage1), ("stage2", stage2)):
        assert cli.main(["export", str(checkpoint), str(folder / name)]) == 0
    return {name: folder / name for name in ("stage1", "stage2")}


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in ("red", "navy")]


def test_stage_1_gives_features_and_matches(exported: dict[str, Path], pictures: list[Image.Image]) -> None:
    model, vis, text = lavis_xformer.from_folder(exported["stage1"])
    image = torch.stack([vis["eval"](picture) for picture in pictures])
    captions = [text["eval"](caption) for caption in ("a red star", "two blue cats")]
    features = model.extract_features({"image": image, "text_input": captions}, mode="image")
    assert features.image_embeds.shape == (2, 32, 96)
    assert model.extract_features({"text_input": captions}, mode="text").text_embeds_proj.shape[::2] == (2, 64)
    assert model.extract_features({"image": image, "text_input": captions}).multimodal_embeds.shape == (2, 32, 96)
    tokens = model.tokenize(captions)
    with torch.no_grad():
        _, image_tokens = model.forward_image(image)
        assert model.forward_text(tokens).shape == (2, 96)
        assert model.compute_itm(image_tokens, tokens.input_ids, tokens.attention_mask).shape == (2,)
    assert len(model.generate({"image": image})) == 2


@pytest.mark.parametrize("way", ["from_folder", "lavis"])
def test_stage_2_captions_and_answers(way: str, exported: dict[str, Path], pictures: list[Image.Image]) -> None:
    folder = exported["stage2"]
    if way == "lavis":
        from lavis.models import load_model_and_preprocess

        model, vis, _ = load_model_and_preprocess("xformer_opt", str(folder), is_eval=True)
    else:
        model, vis, _ = lavis_xformer.from_folder(folder)
    assert not model.load_report.missing_new, "all that was trained came back"
    samples: dict[str, Any] = {"image": torch.stack([vis["eval"](picture) for picture in pictures])}
    assert len(model.generate(samples, num_captions=2)) == 4
    assert len(model.generate({**samples, "prompt": ["a", "two"]}, use_nucleus_sampling=True)) == 2
    asked = {**samples, "text_input": ["how many stars are there?", "what is on the left?"]}
    assert len(model.predict_answers(asked)) == 2
    ranked = model.predict_answers(asked, inference_method="rank", answer_list=["1", "2", "a cat"])
    assert set(ranked) <= {"1", "2", "a cat"}
    assert model.extract_features(samples).image_embeds.shape == (2, 32, 96)


def test_t5_goes_the_same_way(exported: dict[str, Path], pictures: list[Image.Image], smoke: Path) -> None:
    """In one process and without training: its language model may not ship, so it is the one just built."""
    from omegaconf import OmegaConf

    from lavis_xformer.models.stage2 import XFormerT5

    cfg = OmegaConf.load(XFormerT5.default_config_path("mini_t5"))
    cfg.model |= {"t5_model": str(smoke / "t5"), "pretrained": str(exported["stage1"])}
    model: Any = XFormerT5.from_config(cfg.model)
    assert set(model.load_report.missing_new) == {"t5_proj.weight", "t5_proj.bias"}
    _, vis, _ = lavis_xformer.from_folder(exported["stage1"])
    samples = {"image": torch.stack([vis["train"](picture) for picture in pictures])}
    model.train()({**samples, "text_input": ["a red star", "two cats"]})["loss"].backward()
    model({**samples, "text_input": ["how many?", "where?"], "answer": ["2", "top left"]})["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.eval()
    assert len(model.generate(samples, num_beams=2, num_captions=2)) == 4
    asked = {**samples, "text_input": "how many stars are there?"}
    assert len(model.predict_answers(asked)) == 2
    assert set(model.predict_answers(asked, inference_method="rank", answer_list=["1", "2"])) <= {"1", "2"}
