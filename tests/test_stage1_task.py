"""Stage 1's evaluation: what counts as an image and a caption, and which epoch is the best."""

from __future__ import annotations

import pytest
import torch
import toy_training

from lavis_xformer.tasks import stage1
from lavis_xformer.tasks.base import NamedLossTask


def test_images_without_ids_are_one_each_on_every_rank(monkeypatch):
    model, parts = toy_training.ToyModel(), []
    monkeypatch.setattr("lavis_xformer.distributed.collect", lambda own: parts.append(own) or parts)
    for rank in (0, 1):
        monkeypatch.setattr(stage1, "rank", lambda rank=rank: rank)
        task = stage1.Stage1Task()
        for _ in range(2):
            pairs = {"image": torch.rand(2, toy_training.WIDTH), "text_input": ["c0", "c1"]}
            task.observe(model, pairs, [True, True])
        assert task.figures()["chance_t2i_r1"] == pytest.approx(100 / (4 * len(parts)))


def test_the_best_epoch_is_chosen_by_retrieval_both_ways():
    assert stage1.Stage1Task().after_evaluation({"i2t_r1": 10.0, "t2i_r1": 30.0}, "val", 0)["agg_metrics"] == 20


def test_what_pads_a_rank_is_no_caption():
    task = stage1.Stage1Task()
    pairs = {"image": torch.rand(2, toy_training.WIDTH), "text_input": ["c0", "c1"], "image_id": ["i0", "i1"]}
    task.observe(toy_training.ToyModel(), pairs, [True, False])
    assert task.figures()["chance_i2t_r1"] == 100
    assert [(row["question"], row["image"]) for row in task.scores] == [("i2t", "i0"), ("t2i", "i0")]


def test_all_captions_of_an_image_are_ranked():
    task, model = stage1.Stage1Task(), toy_training.ToyModel()
    pairs = {"image": torch.rand(2, toy_training.WIDTH), "text_input": ["c0", "c1"], "image_path": ["a.png", "b.png"]}
    task.observe(model, pairs | {"captions": [["c0", "c2", "c3"], ["c1"]]}, [True, True])
    task.observe(model, pairs | {"captions": [["c4"], ["c5"]]}, [False, False])  # which pad a rank
    assert task.figures()["chance_i2t_r1"] == pytest.approx(50)
    asked = [(row["question"], row["image"]) for row in task.scores]
    assert asked == [("i2t", "a.png"), ("i2t", "b.png"), *[("t2i", "a.png")] * 3, ("t2i", "b.png")]


def test_a_rank_may_have_nothing_but_repeats():
    task, model = stage1.Stage1Task(), toy_training.ToyModel()
    pairs = {"image": torch.rand(1, toy_training.WIDTH), "text_input": ["c0"], "image_id": [0]}
    task.observe(model, pairs, [False])
    assert [len(part) for part in task._texts] == [0]
    task.observe(model, pairs, [True])
    assert len(task.scores) == 0
    assert task.figures()["chance_i2t_r1"] == 100


def test_a_task_with_no_figures_of_its_own_is_judged_by_its_loss():
    assert NamedLossTask().after_evaluation({"loss": 2.0, "loss_itc": 1.5}, "val", 0)["agg_metrics"] == -2
