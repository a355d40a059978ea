"""Captions and retrieval by LAVIS's scoring, with the protocol in the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.tasks.captioning import CaptionTask
from omegaconf import OmegaConf
from PIL import Image
from pycocoevalcap.cider.cider import Cider

import lavis_xformer
from lavis_xformer.data.image_text import Pair
from lavis_xformer.data.image_text_datasets import PairEvalDataset
from lavis_xformer.errors import UserError
from lavis_xformer.tasks import caption_scores
from lavis_xformer.tasks.captions import XFormerCaptionTask, XFormerRetrievalTask


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    """Where LAVIS's tasks write."""
    registry.mapping["paths"].update(result_dir=str(tmp_path / "result"), output_dir=str(tmp_path))
    (tmp_path / "result").mkdir()


class NoNetwork:
    """In the place of SPICE, which may fetch 400 MB, as where these can't be had."""

    def __init__(self) -> None:
        raise URLError("no network")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is fetched, and Java may be missing here."""

    def fail(url: str, folder: str) -> None:
        raise URLError("no network")

    monkeypatch.setattr(caption_scores, "download_url", fail)
    monkeypatch.setattr(caption_scores, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(caption_scores, "Spice", NoNetwork)
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path / "cache"))


def setup(cls: Any, folder: Path, dataset: str = "coco_caption", **run: Any) -> Any:
    questions = folder / "captions.json"
    questions.write_text("[]")
    files = {"build_info": {"annotations": {"test": {"storage": str(questions)}}}}
    config = OmegaConf.create({"run": run, "datasets": {dataset: files}, "model": {"image_size": 364}})
    return cls.setup_task(SimpleNamespace(run_cfg=config.run, to_dict=lambda: OmegaConf.to_container(config)))


class Captioner:
    """Says the same of every image, and keeps what it was asked with."""

    def before_evaluation(self, **kwargs: Any) -> None:
        """LAVIS's tasks tell a model what comes."""

    def generate(self, samples: dict[str, Any], **options: Any) -> list[str]:
        self.asked = {"prompt": samples["prompt"], **options}
        return ["a cat on a mat"] * len(samples["image"])


ASKED = {"num_beams": 5, "max_len": 30, "min_len": 8, "evaluate": True}


def caption(task: XFormerCaptionTask, model: Captioner) -> dict[str, float] | None:
    samples = {"image": torch.zeros(2, 3, 4, 4), "image_id": torch.tensor([3, 5])}
    return task.after_evaluation(task.valid_step(model, samples), "test", "best")


def test_captions_are_asked_for_by_the_protocol_which_the_result_names(tmp_path: Path) -> None:
    model = Captioner()
    assert caption(setup(XFormerCaptionTask, tmp_path, report_metric=False, **ASKED), model) is None, "not scored"
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
    with pytest.raises(UserError, match=r"run\.protocol: 'papers'; did you mean 'paper'"):
        setup(XFormerCaptionTask, tmp_path, protocol="papers", **ASKED)


def test_a_run_may_leave_all_of_it_to_the_protocol(tmp_path: Path) -> None:
    task = setup(XFormerCaptionTask, tmp_path, evaluate=True)
    assert (task.num_beams, task.max_len, task.min_len, task.protocol.name) == (5, 30, 8, "paper")
    assert task.config["run"]["min_len"] == 8, "the result tells it"


def test_only_models_that_can_be_asked_so_are_built(stage2_config: Any, tmp_path: Path) -> None:
    lavis_xformer.register()
    task = setup(XFormerCaptionTask, tmp_path, **ASKED)
    for arch in ("xformer", "lavis_blip2"):
        with pytest.raises(UserError, match=f"xformer_captioning needs .* model.arch {arch} .* run.task: captioning"):
            task.build_model(SimpleNamespace(model_cfg=OmegaConf.create({"arch": arch})))
    assert type(task.build_model(SimpleNamespace(model_cfg=stage2_config.model))).__name__ == "XFormerOPT"


TRUTHS = {
    3: ["A cat on a mat.", "The cat sits, happily."],
    5: ["Two dogs run\rthrough the (green) grass!", "dogs"],
    6: ["a red bus"],
    7: ["An old man's hat"],
}
SAID = {3: "a cat on a mat", 5: "two dogs run on grass", 6: "a red\u2028bus", 7: "a hat"}
DOMAINS = {3: "in-domain", 5: "in-domain", 6: "out-domain", 7: "out-domain"}


def write_truths(file: Path, truths: dict[int, list[str]] = TRUTHS, **more: Any) -> Path:
    rows = [{"image_id": image, "caption": text} for image, texts in truths.items() for text in texts]
    content = {
        "images": [{"id": image, **{key: of[image] for key, of in more.items()}} for image in truths],
        "annotations": [{"id": n, **row} for n, row in enumerate(rows)],
    }
    file.write_text(json.dumps(content))
    return file


def write_said(file: Path) -> Path:
    file.write_text(json.dumps([{"caption": text, "image_id": image} for image, text in SAID.items()]))
    return file


class OneMeteor:
    """In the place of METEOR, always the same."""

    def compute_score(self, *texts: Any) -> tuple[float, list[float]]:
        return 0.25, []


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two tools that need Java: words as they stand, one METEOR."""

    class Words:
        def tokenize(self, lines: dict[int, list[dict[str, str]]]) -> dict[int, list[str]]:
            return {image: [row["caption"].lower() for row in rows] for image, rows in lines.items()}

    monkeypatch.setattr(caption_scores, "PTBTokenizer", Words)
    monkeypatch.setattr(caption_scores, "Meteor", OneMeteor)


@pytest.mark.usefixtures("no_java")
def test_captions_are_scored_one_by_one_for_a_comparison(tmp_path: Path) -> None:
    truths = write_truths(tmp_path / "truths.json")
    task = setup(XFormerCaptionTask, tmp_path, caption_truths=str(truths), test_splits=["test"], **ASKED)
    figures = caption(task, Captioner())
    result = json.loads((tmp_path / "result" / "test_coco_caption.json").read_text())
    assert figures == result["figures"]
    assert figures["agg_metrics"] == figures["CIDEr"] + figures["Bleu_4"] > 0
    assert set(figures) == {"agg_metrics", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"}
    assert result["scorer"] == "pycocoevalcap"
    assert list(result["truth_sha256"]) == [str(truths)]
    first, second = result["answers"]
    assert {key: first[key] for key in first.keys() - {"correct"}} == {
        "caption": "a cat on a mat", "image_id": 3, "question_id": 3, "image": "3", "kind": "caption",
        "group": "caption", "question": "", "truth": "A cat on a mat.", "guess": 0.0,
    }  # fmt: skip
    assert first["correct"] > second["correct"] >= 0
    assert (first["correct"] + second["correct"]) / 2 == pytest.approx(figures["CIDEr"])
    line = json.loads((tmp_path / "evaluate.txt").read_text())
    assert line == {"test": {name: value for name, value in figures.items() if name != "agg_metrics"}}


def test_results_of_all_ranks_are_joined_as_in_lavis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [[{"image_id": 2, "caption": "b"}, {"image_id": 1, "caption": "a"}], [{"image_id": 2, "caption": "again"}]]
    monkeypatch.setattr("lavis_xformer.distributed.collect", lambda value: ranks)
    saved = XFormerCaptionTask.save_result(ranks[0], str(tmp_path), "said", "image_id")
    assert json.loads((tmp_path / "said.json").read_text()) == ranks[0]
    assert saved == str(tmp_path / "said.json")
    XFormerCaptionTask.save_result(ranks[0], str(tmp_path), "all")
    assert json.loads((tmp_path / "all.json").read_text()) == [row for rows in ranks for row in rows]
    theirs = CaptionTask.save_result(ranks[0] + ranks[1], str(tmp_path), "theirs", "image_id")
    assert json.loads(Path(theirs).read_text()) == ranks[0]


def test_captions_are_kept_where_scoring_fails(tmp_path: Path) -> None:
    task = setup(XFormerCaptionTask, tmp_path, test_splits=["test"], **ASKED)
    with pytest.raises(UserError) as raised:
        caption(task, Captioner())
    saved = tmp_path / "result" / "test_epochbest.json"
    for part in (
        "coco_karpathy_test_gt.json can't be downloaded (<urlopen error no network>); put a copy in ",
        f"They are saved in {saved}",
        f"from lavis_xformer.tasks.captions import scored; print(scored('TRUTHS.json', '{saved}')[0])",
    ):
        assert part in str(raised.value)
    result = json.loads((tmp_path / "result" / "test_coco_caption.json").read_text())
    assert (result["protocol"]["name"], result["scorer"], result["figures"]) == ("paper", "none", {})
    assert [row["caption"] for row in result["answers"]] == ["a cat on a mat"] * 2
    assert list(result["question_sha256"]) == [str(tmp_path / "captions.json")]
    few = write_truths(tmp_path / "few.json", {3: TRUTHS[3]})
    with pytest.raises(UserError, match=r"not scored: .*few\.json has captions for only 1 of 2 .* are saved in "):
        caption(setup(XFormerCaptionTask, tmp_path, caption_truths=str(few), **ASKED), Captioner())


@pytest.mark.usefixtures("no_java")
def test_a_file_of_truths_asks_for_scores_and_coco_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(url: str, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        fetched.append(str(write_truths(Path(folder) / url.rpartition("/")[2])))

    monkeypatch.setattr(caption_scores, "download_url", fetch)
    own = write_truths(tmp_path / "own.json")
    given = caption(
        setup(XFormerCaptionTask, tmp_path, caption_truths=str(own), report_metric=False, **ASKED), Captioner()
    )
    assert not fetched
    assert caption(setup(XFormerCaptionTask, tmp_path, **ASKED), Captioner()) == given
    assert fetched == [str(tmp_path / "cache" / "coco_gt" / "coco_karpathy_test_gt.json")]


def own_captions(folder: Path, ids: list[Any]) -> PairEvalDataset:
    """Two photos with captions of the user's own."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    pairs = [
        Pair("a.png", ("A cat on a mat.", "The cat sits."), str(ids[0]), 1),
        Pair("b.png", ("Two dogs run.",), str(ids[1]), 2),
    ]
    tensors = torch.zeros(3, 4, 4)
    return PairEvalDataset(pairs=pairs, vis_root=folder, vis_processor=lambda image: tensors, text_processor=str.lower)


@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize("ids", [[5, 3], ["a", "b"]])
def test_captions_of_own_photos_are_scored_against_those_of_their_file(tmp_path: Path, ids: list[Any]) -> None:
    dataset = own_captions(tmp_path, ids)
    task = setup(XFormerCaptionTask, tmp_path, "image_text_json", test_splits=["test"], **ASKED)
    task.check_split("test", dataset)
    model = Captioner()
    task.before_evaluation(model, dataset)
    said = task.valid_step(model, dataset.collater([dataset[0], dataset[1]]))
    figures = task.after_evaluation(said, "test", "best")
    first, second = json.loads((tmp_path / "result" / "test_image_text_json.json").read_text())["answers"]
    assert [(row["image"], row["truth"]) for row in (first, second)] == [
        ("a.png", "A cat on a mat."),
        ("b.png", "Two dogs run."),
    ]
    assert first["correct"] > second["correct"]
    assert figures["Bleu_1"] > 0


def test_references_are_found_by_the_images_own_ids_alone(tmp_path: Path) -> None:
    truths = str(write_truths(tmp_path / "truths.json"))
    task = setup(XFormerCaptionTask, tmp_path, "image_text_json", **ASKED, caption_truths=truths)
    task.check_split("val", own_captions(tmp_path, [5, 3]))
    with pytest.raises(UserError, match=r"images of 'val' have no ids of their own: set id_key .* or leave"):
        task.check_split("val", own_captions(tmp_path, ["a", "b"]))


@pytest.mark.usefixtures("no_java")
def test_scores_by_domain_and_without_what_spice_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truths = write_truths(tmp_path / "truths.json", TRUTHS | {9: ["a tree"]}, domain=DOMAINS | {9: "in-domain"})
    figures, rows = caption_scores.scored(truths, write_said(tmp_path / "said.json"))
    words = [{image: [" ".join(text.lower().split()) for text in of[image]] for image in (6, 7)}
             for of in (TRUTHS, {image: [text] for image, text in SAID.items()})]  # fmt: skip
    assert figures["CIDEr_out-domain"] == pytest.approx(Cider().compute_score(*words)[0])
    assert {name for name in figures if "domain" in name} == {"CIDEr_in-domain", "CIDEr_out-domain"}
    assert "SPICE" not in figures
    assert "SPICE is skipped, the other scores are valid: it needs Stanford CoreNLP" in caplog.text
    assert "5 images have references; only the 4 captioned are scored" in caplog.text
    assert [row["image_id"] for row in rows] == list(SAID)
    some = write_truths(tmp_path / "some.json", {3: TRUTHS[3]})
    with pytest.raises(UserError, match=r"some\.json has captions for only 1 of 4 images"):
        caption_scores.scored(some, tmp_path / "said.json")


@pytest.mark.usefixtures("no_java")
def test_spice_that_this_java_cannot_run_leaves_the_other_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = write_said(tmp_path / "said.json")
    monkeypatch.setattr(caption_scores, "Spice", lambda: SimpleNamespace(compute_score=lambda *texts: (0.5, [])))
    assert caption_scores.scored(write_truths(tmp_path / "truths.json"), said)[0]["SPICE"] == 0.5

    def crash(*texts: Any) -> None:
        subprocess.run([sys.executable, "-c", "raise SystemExit(1)"], check=True)

    monkeypatch.setattr(caption_scores, "Spice", lambda: SimpleNamespace(compute_score=crash))
    figures, _ = caption_scores.scored(tmp_path / "truths.json", said)
    assert "SPICE" not in figures
    assert figures["CIDEr"] > 0


@pytest.mark.skipif(which("java") is None, reason="pycocoevalcap's tokeniser needs Java")
def test_scores_with_real_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: lower case, no punctuation but brackets, a possessive apart; ends of lines shift nothing."""
    references = {
        3: ["a cat on a mat", "the cat sits happily"],
        5: ["two dogs run through the -lrb- green -rrb- grass", "dogs"],
        6: ["a red bus"],
        7: ["an old man 's hat"],
    }
    candidates = {3: ["a cat on a mat"], 5: ["two dogs run on grass"], 6: ["a red bus"], 7: ["a hat"]}
    assert caption_scores.tokens(TRUTHS) == references
    monkeypatch.setattr(caption_scores, "Meteor", OneMeteor)  # the real one takes half a minute
    figures, rows = caption_scores.scored(write_truths(tmp_path / "truths.json"), write_said(tmp_path / "said.json"))
    cider, each = Cider().compute_score(references, candidates)
    assert figures["CIDEr"] == pytest.approx(cider)
    assert [row["correct"] for row in rows] == pytest.approx(each)


@pytest.mark.slow
@pytest.mark.skipif(which("java") is None, reason="pycocoevalcap's tokeniser and METEOR need Java")
def test_scores_are_laviss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavis.tasks import captioning
    from pycocoevalcap import eval as pycocoevalcap

    plain = {image: [" ".join(text.split()) for text in texts] for image, texts in TRUTHS.items()}
    (tmp_path / "cache").mkdir()
    truths = write_truths(tmp_path / "cache" / "coco_karpathy_test_gt.json", plain)
    said = write_said(tmp_path / "said.json")
    rows = [{**row, "caption": " ".join(row["caption"].split())} for row in json.loads(said.read_text())]
    said.write_text(json.dumps(rows))
    spice = SimpleNamespace(compute_score=lambda *texts: (0.5, [{}] * len(SAID)), method=lambda: "SPICE")
    for module in (caption_scores, pycocoevalcap):
        monkeypatch.setattr(module, "Spice", lambda: spice)
    lavis = captioning.coco_caption_eval(str(truths.parent), str(said), "test")
    figures, rows = caption_scores.scored(truths, said)
    assert figures == pytest.approx(lavis.eval)
    assert {row["image_id"]: row["correct"] for row in rows} == pytest.approx(
        {image: scores["CIDEr"] for image, scores in lavis.imgToEval.items()}
    )


def test_what_scoring_lacks_is_told_before_anything_is_captioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(dataset: str = "coco_caption", **run: Any) -> None:
        setup(XFormerCaptionTask, tmp_path, dataset, **{"test_splits": ["val"], **ASKED, **run})

    with pytest.raises(UserError, match=r"run\.caption_truths: there is no file .*gone\.json"):
        check(caption_truths=str(tmp_path / "gone.json"))
    for content in ("[]", "{", '{"images": [], "annotations": [{"image_id": 1}]}'):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(UserError, match=r"wrong\.json is not in COCO's format, .*\"image_id\", \"caption\""):
            check(caption_truths=str(tmp_path / "wrong.json"))
    truths = str(write_truths(tmp_path / "truths.json"))
    task = setup(XFormerCaptionTask, tmp_path, **ASKED, caption_truths=truths)
    task.check_split("val", [{"image_id": torch.tensor(next(iter(TRUTHS)))}])
    with pytest.raises(UserError, match=r"truths\.json has no captions of image 77 of 'val'"):
        task.check_split("val", [{"image_id": "77"}])
    with pytest.raises(UserError, match=r"captions for coco_caption only, not for nocaps; set run\.caption_truths"):
        check("nocaps")
    check("nocaps", caption_truths=truths)
    monkeypatch.setattr(caption_scores, "which", lambda program: None)
    with pytest.raises(UserError, match=r"no `java` on the PATH; install .* or set run\.report_metric to False"):
        check()
    check(report_metric=False)
    check(test_splits=[])  # nothing is scored


@pytest.mark.usefixtures("no_java")
def test_references_that_cannot_be_had_are_told_before_training(tmp_path: Path) -> None:
    task = setup(XFormerCaptionTask, tmp_path, **ASKED)
    with pytest.raises(UserError, match=r"coco_karpathy_val_gt\.json can't be downloaded .* a copy in .*/coco_gt, "):
        task.check_split("val", [{"image_id": 3}])
    setup(XFormerCaptionTask, tmp_path, **{**ASKED, "report_metric": False}).check_split("val", [{"image_id": 3}])


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
    found = {"i2t_r1": [], "t2i_r1": []}
    for row in result["answers"]:
        found[row["group"]].append((row["image"], row["correct"]))
    assert found == {"i2t_r1": [("0", 1), ("1", 0)], "t2i_r1": [("0", 1), ("1", 1), ("1", 0)]}
    assert task.cfg.use_dist_eval_sampler is False, "a rank's share of the split is not ranked as the whole"
    ranker = Ranker()
    setup(XFormerRetrievalTask, tmp_path).evaluation(ranker, SimpleNamespace(dataset=dataset))
    assert ranker.k_test == 128, "the protocol's, which the result then tells"
    with pytest.raises(UserError, match=r"run\.k_test is 128, but 'val' has only 2 candidates"):
        setup(XFormerRetrievalTask, tmp_path).check_split(
            "val", SimpleNamespace(**vars(dataset), text="abc", image="ab")
        )
    for odd in ("a kite", []):
        rows = [{"caption": ["a star"]}, {"caption": odd}]
        with pytest.raises(
            UserError, match=r"'val': row 2: its captions are .*; to be ranked, it needs a list of them"
        ):
            task.check_split("val", SimpleNamespace(**vars(dataset), text="abc", image="ab", annotation=rows))
    with pytest.raises(UserError, match=r"run\.task: xformer_retrieval ranks images and captions"):
        task.check_split("val", [{"image": 0}])
    with pytest.raises(UserError, match=r"run\.protocol: 'blip'"):
        setup(XFormerRetrievalTask, tmp_path, protocol="blip", k_test=2)


@pytest.mark.usefixtures("no_java")
def test_a_file_of_truths_takes_the_place_of_the_files_own_captions(tmp_path: Path) -> None:
    dataset = own_captions(tmp_path, [5, 3])
    truths = write_truths(tmp_path / "truths.json", {5: ["a bird"], 3: ["a fish"]})
    task = setup(XFormerCaptionTask, tmp_path, "image_text_json", caption_truths=str(truths), **ASKED)
    task.before_evaluation(Captioner(), dataset)
    task.after_evaluation(task.valid_step(Captioner(), dataset.collater([dataset[0], dataset[1]])), "test", "best")
    result = json.loads((tmp_path / "result" / "test_image_text_json.json").read_text())
    assert [row["truth"] for row in result["answers"]] == ["a bird", "a fish"]
    assert list(result["truth_sha256"]) == [str(truths)]
