"""Retrieval figures against a reference that sorts, with several captions per image."""

from __future__ import annotations

import pytest
import torch

from lavis_xformer.tasks import metrics


def naive(similarity, owners):
    """R@k as one would do it by hand."""
    images, texts = similarity.shape
    figures = {}
    for k in metrics.KS:
        hits = [any(owners[t] == i for t in similarity[i].argsort(descending=True)[:k]) for i in range(images)]
        figures[f"i2t_r{k}"] = 100 * sum(hits) / images
        hits = [owners[t] in similarity[:, t].argsort(descending=True)[:k] for t in range(texts)]
        figures[f"t2i_r{k}"] = 100 * sum(map(float, hits)) / texts
    return figures


@pytest.mark.parametrize("seed", range(3))
def test_recalls_equal_the_naive_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, 13, (40,), generator=generator)
    owners[:13] = torch.arange(13)
    similarity = torch.randn(13, 40, generator=generator)
    similarity += 1.5 * (owners[None] == torch.arange(13)[:, None])
    assert metrics.recalls(metrics.ranks(similarity, owners)) == pytest.approx(naive(similarity, owners))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_collapsed_model_scores_nothing(value):
    figures = metrics.recalls(metrics.ranks(torch.full((20, 20), value), torch.arange(20)))
    assert set(figures.values()) == {0.0}


def test_chance_is_what_random_scores_give():
    owners = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8])
    generator = torch.Generator().manual_seed(0)
    trials = [metrics.recalls(metrics.ranks(torch.randn(9, 12, generator=generator), owners)) for _ in range(3000)]
    for name, chance in metrics.chance_recalls(owners).items():
        mean = sum(trial[name] for trial in trials) / len(trials)
        assert mean == pytest.approx(chance, abs=1.5), name


def test_hits_are_the_recalls_at_1_one_by_one():
    owners = torch.tensor([0, 0, 1, 2])
    similarity = torch.tensor([[0.1, 0.9, 0.8, 0.0], [0.5, 0.2, 0.4, 0.3], [0.0, 0.1, 0.2, 0.9]])
    ranks = metrics.ranks(similarity, owners)
    rows = metrics.hits(ranks, owners, ["a", "b", "c"])
    assert [(r["group"], r["image"], r["correct"]) for r in rows] == [
        ("i2t_r1", "a", 1), ("i2t_r1", "b", 0), ("i2t_r1", "c", 1),
        ("t2i_r1", "a", 0), ("t2i_r1", "a", 1), ("t2i_r1", "b", 0), ("t2i_r1", "c", 1),
    ]  # fmt: skip
    figures, chance = metrics.recalls(ranks), metrics.chance_recalls(owners)
    for way in ("i2t_r1", "t2i_r1"):
        own = [row for row in rows if row["group"] == way]
        assert 100 * sum(row["correct"] for row in own) / len(own) == pytest.approx(figures[way])
        assert 100 * sum(row["guess"] for row in own) / len(own) == pytest.approx(chance[way])


def test_an_image_without_captions_has_a_row_and_no_chance() -> None:
    wrong = {"i2t": torch.tensor([0, 0, 2]), "t2i": torch.tensor([0, 1])}
    rows = metrics.hits(wrong, torch.tensor([0, 1]), ["a", "b", "c"])
    assert [(row["image"], row["guess"]) for row in rows[:3]] == [("a", 0.5), ("b", 0.5), ("c", 0)]
