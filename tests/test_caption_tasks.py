"""Captions and retrieval by LAVIS's scoring, with the protocol in the result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.tasks import captioning
from omegaconf import OmegaConf
from pycocoevalcap.cider.cider import Cider

import lavis_xformer
from lavis_xformer.errors import UserError
from lavis_xformer.tasks.captions import XFormerCaptionTask, XFormerRetrievalTask


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    """Where LAVIS's tasks write."""
    registry.mapping["paths"].update(result_dir=str(tmp_path / "result"), output_dir=str(tmp_path))
    (tmp_path / "result").mkdir()


def setup(cls: Any, folder: Path, **run: Any) -> Any:
    truths = folder / "captions.json"
    truths.write_text("[]")
    dataset = {"build_info": {"annotations": {"test": {"storage": str(truths)}}}}
    config = OmegaConf.create({"run": run, "datasets": {"coco_caption": dataset}, "model": {"image_size": 364}})
    return cls.setup_task(SimpleNamespace(run_cfg=config.run, to_dict=lambda: OmegaConf.to_container(config)))


class Captioner:
    """Says the same of every image, and keeps what it was asked with."""

    def generate(self, samples: dict[str, Any], **options: Any) -> list[str]:
        self.asked = {"prompt": samples["prompt"], **options}
        return ["a cat on a mat"] * len(samples["image"])


ASKED = {"num_beams": 5, "max_len": 30, "min_len": 8, "evaluate": True}


def caption(task: XFormerCaptionTask, model: Captioner) -> dict[str, float] | None:
    samples = {"image": torch.zeros(2, 3, 4, 4), "image_id": torch.tensor([3, 5])}
    return task.after_evaluation(task.valid_step(model, samples), "test", "best")


def test_captions_are_asked_for_by_the_protocol_which_the_result_names(tmp_path: Path) -> None:
    model = Captioner()
    caption(setup(XFormerCaptionTask, tmp_path, report_metric=False, **ASKED), model)
    assert model.asked == {
        "prompt": "a photo of", "num_beams": 5, "max_length": 30, "min_length": 8, "length_penalty": 1.0,
    }  # fmt: skip
    result = json.loads((tmp_path / "result" / "test_coco_caption.json").read_text())
    assert (result["protocol"]["name"], result["protocol"]["prompt"], result["scorer"]) == (
        "paper",
        "a photo of",
        "none",
    )
    assert [row["image_id"] for row in result["answers"]] == [3, 5]
    assert list(result["question_sha256"]) == [str(tmp_path / "captions.json")]
    caption(setup(XFormerCaptionTask, tmp_path, report_metric=False, prompt="", protocol="lavis", **ASKED), model)
    assert model.asked["prompt"] == ""
    with pytest.raises(UserError, match=r"run\.protocol: 'papers': did you mean 'paper'"):
        setup(XFormerCaptionTask, tmp_path, protocol="papers", **ASKED)


def test_a_run_may_leave_all_of_it_to_the_protocol(tmp_path: Path) -> None:
    task = setup(XFormerCaptionTask, tmp_path, evaluate=True)
    assert (task.num_beams, task.max_len, task.min_len, task.protocol.name) == (5, 30, 8, "paper")
    assert task.config["run"]["min_len"] == 8, "the result tells it"


def test_only_models_that_can_be_asked_so_are_built(stage2_config: Any, tmp_path: Path) -> None:
    lavis_xformer.register()
    task = setup(XFormerCaptionTask, tmp_path, **ASKED)
    for arch in ("xformer", "lavis_blip2"):
        with pytest.raises(UserError, match=f"xformer_captioning asks .* model.arch {arch} .* run.task: captioning"):
            task.build_model(SimpleNamespace(model_cfg=OmegaConf.create({"arch": arch})))
    assert type(task.build_model(SimpleNamespace(model_cfg=stage2_config.model))).__name__ == "XFormerOPT"


def test_captions_are_scored_as_lavis_scores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pycocoevalcap; its CIDEr alone here, for METEOR and SPICE need Java."""
    truths = {3: ["a cat on a mat", "the cat sits"], 5: ["two dogs run on grass"]}

    def evaluate(root: str, file: str, split: str) -> Any:
        said = {row["image_id"]: [row["caption"]] for row in json.loads(Path(file).read_text())}
        return SimpleNamespace(eval={"CIDEr": Cider().compute_score(truths, said)[0], "Bleu_4": 0.25})

    monkeypatch.setattr(captioning, "coco_caption_eval", evaluate)
    registry.mapping["paths"].setdefault("cache_root", str(tmp_path))
    figures = caption(setup(XFormerCaptionTask, tmp_path, **ASKED), Captioner())
    result = json.loads((tmp_path / "result" / "test_coco_caption.json").read_text())
    assert figures == result["figures"]
    assert figures["agg_metrics"] == figures["CIDEr"] + 0.25 > 1
    assert result["scorer"] == "pycocoevalcap"


class Ranker:
    """Two images, three texts; text 0 is of image 0, the others of image 1."""

    def compute_sim_matrix(self, loader: Any, task_cfg: Any) -> tuple[Any, Any]:
        self.k_test = task_cfg.k_test
        i2t = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1]])  # image 1 ranks a text of image 0 first
        return i2t, i2t.T


def test_retrieval_by_hand_with_its_protocol(tmp_path: Path) -> None:
    task = setup(XFormerRetrievalTask, tmp_path, k_test=2)
    dataset = SimpleNamespace(txt2img={0: 0, 1: 1, 2: 1}, img2txt={0: [0], 1: [1, 2]})
    figures = task.after_evaluation(task.evaluation(Ranker(), SimpleNamespace(dataset=dataset)), "test", epoch="best")
    assert (figures["txt_r1"], figures["txt_r5"]) == (50, 100)
    assert figures["img_r1"] == pytest.approx(200 / 3)  # text 2 is nearer to image 0
    assert figures["chance_txt_r1"] == pytest.approx(50), "a third for image 0, two for image 1"
    assert figures["chance_img_r1"] == pytest.approx(50)
    result = json.loads((tmp_path / "result" / "test_coco_caption.json").read_text())
    assert result["protocol"] == {"name": "paper", "k_test": 2, "image_size": 364}
    assert result["figures"] == figures
    assert task.cfg.use_dist_eval_sampler is False, "a rank's share of the split is not ranked as the whole"
    ranker = Ranker()
    setup(XFormerRetrievalTask, tmp_path).evaluation(ranker, SimpleNamespace(dataset=dataset))
    assert ranker.k_test == 128, "the protocol's, which the result then tells"
    with pytest.raises(UserError, match=r"run\.protocol: 'blip'"):
        setup(XFormerRetrievalTask, tmp_path, protocol="blip", k_test=2)
