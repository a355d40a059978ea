"""The doctor, shown environments that do not exist."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lavis_xformer import doctor

NEEDED = [Requirement(r) for r in ("numpy<2,>=1.22", "transformers<4.27,>=4.25", "timm==0.4.12", "fairscale==0.4.4")]
GOOD = {"numpy": "1.26.4", "transformers": "4.26.1", "timm": "0.4.12", "fairscale": "0.4.4"}


def verdicts(findings) -> dict[str, str]:
    return {finding.subject: finding.verdict for finding in findings}


def test_a_good_environment_is_one_line():
    assert verdicts(doctor.check_packages(NEEDED, GOOD.get)) == {"required packages": "ok"}


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("numpy", "2.1.0", "OpenCV"),
        ("transformers", "4.40.0", "4.25 and 4.26"),
        ("timm", "1.0.0", "timm==0.4.12"),
        ("fairscale", None, "pip install 'fairscale==0.4.4'"),
    ],
)
def test_a_bad_package_is_named_with_its_remedy(package: str, version: str | None, words: str):
    findings = list(doctor.check_packages(NEEDED, {**GOOD, package: version}.get))
    wrong = [finding for finding in findings if finding.verdict == "WRONG"]
    assert [finding.subject for finding in wrong] == [package]
    assert words in wrong[0].remedy
    assert (version or "missing") in wrong[0].found


def test_a_package_that_is_not_installed_at_all():
    assert verdicts(doctor.check_packages([], GOOD.get)) == {doctor.PACKAGE: "WRONG"}


@pytest.mark.parametrize("minor", range(8, 15))
def test_python(minor: int):
    assert doctor.check_python((3, minor)).verdict == ("ok" if minor in (10, 11) else "WRONG")


@pytest.mark.parametrize(
    ("torch", "verdict"), [("2.11.0", "ok"), ("2.11.0+cu130", "ok"), ("2.10.0", "WRONG"), (None, "note")]
)
def test_torch_and_torchvision_are_a_pair(torch: str | None, verdict: str):
    assert doctor.check_torchvision([Requirement("torch==2.11.0")], torch).verdict == verdict


def test_a_crash_names_the_package_being_imported():
    lines = [json.dumps({"importing": name}) for name in ("numpy", "torch", "cv2")]
    (finding,) = doctor.check_imports((lines, "ImportError: numpy.core.multiarray failed to import"))
    assert finding.verdict == "WRONG"
    assert finding.subject == "import cv2"
    assert "multiarray" in finding.found


@pytest.mark.parametrize(
    ("gpu", "bf16", "words"), [(None, False, "CPU"), ("A GPU", False, "no bf16"), ("A GPU", True, "with bf16")]
)
def test_gpu(gpu: str | None, bf16: bool, words: str):
    *_, finding = doctor.check_imports(([json.dumps({"gpu": gpu, "bf16": bf16})], ""))
    assert words in finding.found
    assert finding.verdict != "WRONG"


def test_folders(tmp_path: Path):
    assert doctor.check_folder("cache", tmp_path / "new" / "deeper", "").verdict == "ok"
    (tmp_path / "file").write_text("")
    assert doctor.check_folder("cache", tmp_path / "file" / "below", "set it").verdict == "WRONG"


def test_a_folder_below_one_that_cant_be_read(tmp_path: Path, monkeypatch):
    (tmp_path / "locked").mkdir()
    stat = os.stat

    def refuse(path, **options):
        if "locked" in Path(path).parts[:-1]:
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    assert doctor.check_folder("cache", tmp_path / "locked" / "home" / "cache", "set it").verdict == "WRONG"


def test_models_of_the_hub_are_told():
    (hub,) = doctor.check_reference("model.mae_model", "facebook/vit-mae-huge")
    assert hub.verdict == "note"
    assert not list(doctor.check_reference("model.vqa_prompt", "Answer yes/no:"))


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ("model.pretrained=output/nothing.pth", "model.pretrained: there is no output/nothing.pth"),
        ("model.bert=weights/of/bert", "model.bert: there is no weights/of/bert"),
        ("model.bert=~/no-such-folder", r"model.bert: there is no /.*/no-such-folder"),
        ("run.device=tpu", "run.device"),
    ],
)
def test_what_a_run_would_stumble_over(option: str, fault: str):
    (finding,) = doctor.check_yaml("projects/xformer/pretrain.yaml", [option])
    assert finding.verdict == "WRONG"
    assert re.match(fault, finding.found)


def test_a_folder_in_the_home_folder_is_found(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bert").mkdir()
    assert {found.verdict for found in doctor.check_yaml("projects/xformer/pretrain.yaml", ["model.bert=~/bert"])} == {
        "ok"
    }


def test_own_data_that_a_yaml_lacks():
    (finding,) = doctor.check_yaml("projects/xformer/eval/gvt_coco_oc.yaml", [])
    assert finding.verdict == "WRONG"
    assert "set datasets.gvt_coco_oc.splits.test.annotations" in finding.found


@pytest.mark.parametrize("wrong", [True, False])
def test_exit_status_says_whether_something_is_wrong(wrong: bool, monkeypatch, capsys):
    finding = doctor.Finding("numpy", "WRONG" if wrong else "note", "2.0", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda cfg_path, options: iter([finding]))
    assert doctor.main([]) == int(wrong)
    assert "-> mend it" in capsys.readouterr().out


def test_options_are_those_of_a_yaml(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--options", "run.max_epoch=1"])
    assert "--options needs a --cfg-path" in capsys.readouterr().err
