"""The probe reads what is there, reads nothing where nothing is, and sees tokens in their order."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTMAEForPreTraining

from lavis_xformer.errors import UserError
from lavis_xformer.mini.mae import mae_config
from lavis_xformer.models.mae import MaskedAutoencoder
from lavis_xformer.probe import figure, pooling, run, spectrum
from lavis_xformer.probe.exam import NONE, TASKS, Exam, make_exam
from lavis_xformer.probe.pooling import STOP, TRAIN, Probe, grid, train_probe
from lavis_xformer.probe.positions import position_r2
from lavis_xformer.probe.spectrum import filtered, similarity_curves
from lavis_xformer.probe.tokens import Standardise, mae_tokens, pixel_tokens


def told(count: int, seed: int) -> Exam:
    """An exam whose images have the answer of every task in their first pixel."""
    labels = {
        name: torch.randint(task.classes, (count,), generator=torch.Generator().manual_seed(seed + i))
        for i, (name, task) in enumerate(TASKS.items())
    }
    images = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    for column, name in enumerate(TASKS):
        images[:, 0, 0, column] = 255 * labels[name] // TASKS[name].classes
    return Exam(images, torch.rand(count, 2), labels)


def reveal(images):
    """Five equal tokens that show the first row of pixels."""
    row = torch.nn.functional.one_hot((images[:, 0, 0, :6] * 64).round().long(), 65).flatten(1)
    return row[:, None].expand(-1, 5, -1).float()


def test_probe_reads_what_is_there_and_nothing_else():
    exams = {TRAIN: told(2000, 0), STOP: told(400, 100), "val": told(400, 200)}
    seen = train_probe(reveal, exams, "val", steps=60, seeds=1)
    blind = train_probe(lambda x: torch.ones(len(x), 5, 8), exams, "val", steps=20, seeds=1)
    assert all(seen[name][0] > 90 for name in ("count", "position", "mark", "facing", "relation"))
    assert blind["facing"][0] < 40
    assert blind["count"][0] < 25


def test_the_probe_tells_where_the_one_token_that_differs_is():
    """Tokens alike but for one, in a square of 3 x 3; its place is the answer."""

    def marked(images):
        cell = (images[:, 0, 0, list(TASKS).index("position")] * 9).round().long()
        return torch.nn.functional.one_hot(1 + cell, 10)[..., None].expand(-1, -1, 4).float()

    exams = {TRAIN: told(1000, 0), STOP: told(200, 100), "val": told(200, 200)}
    assert train_probe(marked, exams, "val", steps=150, seeds=1)["position"][0] > 90


def test_a_token_is_told_its_row_and_column():
    places = grid(17)  # CLS and a square of 4 x 4
    assert not places[0].any()
    assert places[1:].nonzero()[:, 1].unflatten(0, (4, 4, 2)).tolist() == [
        [[row, 4 + column] for column in range(4)] for row in range(4)
    ]


def test_the_best_step_is_chosen_on_other_scenes_than_are_reported_on(monkeypatch):
    """Of eight checks the third is the best on the scenes to stop by, and the sixth as good; on the others the last."""
    stop, shown = [10, 20, 90, 30, 40, 90, 50, 60], [1, 2, 3, 4, 5, 6, 7, 8]
    said = iter([value for pair in zip(stop, shown, strict=True) for value in pair])
    monkeypatch.setattr(pooling, "correct", lambda probe_, tokens, exam: dict.fromkeys(TASKS, float(next(said))))
    exams = {TRAIN: told(300, 0), STOP: told(4, 100), "val": told(4, 200)}
    assert train_probe(reveal, exams, "val", steps=8, seeds=1) == {name: [3.0] for name in TASKS}


def test_a_pointed_task_looks_nearest_to_the_point_and_others_everywhere():
    fresh = Probe(dim=8, patches=17)  # CLS and a square of 4 x 4
    far = fresh.farness(torch.tensor([[0.9, 0.1], [0.4, 0.8]])).detach()  # right of the first row; below, left
    assert far.shape == (2, 4, len(TASKS), 1, 17)
    for task, name in enumerate(TASKS):
        if TASKS[name].pointed:
            assert (far[:, :, task, 0, 1:].argmin(-1) == torch.tensor([[3], [13]])).all()
            assert (far[:, :, task, 0, 0] == 0).all()
        else:
            assert (far[:, :, task] == 0).all()


def test_pointing_decides_what_a_pointed_task_reads():
    torch.manual_seed(0)
    fresh, tokens = Probe(dim=8, patches=17), torch.randn(1, 17, 8)
    elsewhere = tokens.clone()
    elsewhere[:, 16] += 5  # the last patch, far from the point
    fresh.focus.data.fill_(3.0)  # all heads look near
    here = torch.tensor([[0.1, 0.1]])
    for name, logits in fresh(tokens, here).items():
        change = (fresh(elsewhere, here)[name] - logits).abs().max()
        assert change < 1e-4 if TASKS[name].pointed else change > 1e-4, name


def test_a_batch_in_which_a_task_has_no_label_teaches_it_nothing():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([2, NONE, 0, NONE])
    assert pooling.labelled(logits, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item())
    pooling.labelled(logits, torch.full((4,), NONE)).backward()
    assert (logits.grad == 0).all()


def test_labels_are_classes_or_none():
    exam = make_exam("probe-test-of-tests", seed=0, count=500)
    for name, task in TASKS.items():
        known = exam.labels[name][exam.labels[name] != NONE]
        assert len(known) > 40
        assert known.min() >= 0
        assert known.max() < task.classes
    assert ((exam.points > 0) & (exam.points < 1)).all()
    assert exam.images.shape == (500, 3, 64, 64)


def test_mae_tokens_are_those_of_transformers_without_masking():
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(mae_config()).eval()
    model.config.mask_ratio = 0.0
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    order = torch.arange(64.0).expand(2, -1)  # ascending noise keeps the patches in place
    theirs = model.vit((images - mean) / std, noise=order).last_hidden_state
    torch.testing.assert_close(mae_tokens(MaskedAutoencoder(model=model), images), theirs)


def test_pixel_tokens_follow_the_reading_order():
    images = torch.zeros(1, 3, 64, 64)
    images[:, :, :8, 8:16] = 1  # second patch of the first row
    tokens = pixel_tokens(images)
    assert tokens.shape == (1, 65, 192)
    assert (tokens[0, 1:].sum(-1) > 0).nonzero().tolist() == [[1]]


def test_standardised_channels_have_mean_zero_and_deviation_one():
    tokens = 5 + 3 * torch.randn(50, 4, 6)
    scaled = Standardise(tokens)(tokens).flatten(0, 1)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(6))


def test_low_and_high_pass_share_the_image_between_them():
    images = torch.randint(60, 190, (2, 3, 64, 64), dtype=torch.uint8)
    assert (filtered(images, 64, keep="low").int() - images.int()).abs().max() <= 1
    flat = filtered(images, 64, keep="high").float()  # only the mean is left
    assert flat.flatten(2).std(-1).max() < 1
    assert filtered(images, 4, keep="low").float().std() < images.float().std()


def test_a_source_of_low_frequencies_survives_a_low_pass():
    images = torch.randint(0, 255, (8, 3, 64, 64), dtype=torch.uint8)
    curves = similarity_curves({"low": lambda x: pixel_tokens(filtered((255 * x).byte(), 2, keep="low") / 255)}, images)
    assert min(curves["low"]["low"][1:]) > max(curves["low"]["high"][1:])


def test_tokens_that_hold_their_place_are_told_from_those_that_do_not():
    content = torch.randn(40, 17, 24, generator=torch.Generator().manual_seed(0))  # CLS and a square of 4 x 4
    places = torch.randn(17, 24, generator=torch.Generator().manual_seed(1))
    assert abs(position_r2(content)) < 0.2
    assert position_r2(content + 5 * places) > 0.8
    assert position_r2(content[:, [0, *range(16, 0, -1)]] + 5 * places) > 0.8, "whatever the images show"


def test_interval_is_students():
    mean, half = run.interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    assert run.interval([1.0]) == (1.0, math.inf)


def test_an_unknown_source_is_named_before_anything_is_drawn(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "make_exam", lambda *args, **kwargs: pytest.fail("exams are drawn"))
    with pytest.raises(UserError, match=r"--sources: 'pixel'; did you mean 'pixels'\?"):
        run.main(["--set", str(smoke), "--sources", "C, pixel", "--out", str(tmp_path / "out")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file can't be created: File exists; name another folder"):
        run.main(["--set", str(smoke), "--out", str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"--set .*nowhere/clip does not exist; lavis-xformer build-mini"):
        run.main(["--set", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_scenes_too_few_to_ask_for_everything_are_named(tmp_path, monkeypatch):
    answers = dict.fromkeys(TASKS, torch.full((3,), NONE))
    monkeypatch.setattr(run, "make_exam", lambda *args, **kwargs: Exam(torch.zeros(3), torch.zeros(3, 2), answers))
    with pytest.raises(UserError, match="--scenes 3: none of these scenes has an answer for category; use more"):
        run.main(["--scenes", "3", "--out", str(tmp_path)])


@pytest.mark.filterwarnings("error")
def test_the_figure_of_pixels_alone_has_no_curves(tmp_path):
    figure.draw(tmp_path / "probe.png", {"pixels": {"count": (9.5, 6.4)}}, {"cutoffs": {"cycles": [2.0]}})
    assert (tmp_path / "probe.png").stat().st_size > 1_000


def test_command_writes_table_figures_and_json(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(spectrum, "CUTOFFS", (2, 8))
    out = tmp_path / "probe"
    small = ["--scenes", "40", "--held-out", "40", "--steps", "1", "--seeds", "2"]
    assert run.main(["--set", str(smoke), "--out", str(out), *small]) == 0
    said = (out / "probe.md").read_text()
    assert "C+M minus C two layers" in said
    assert "| random, high-passed |" in said
    record = json.loads((out / "probe.json").read_text())
    assert set(record["accuracy"]) == {"C", "M", "C+M", "C two layers", "pixels", "random"}
    assert len(record["accuracy"]["C"]["count"]) == 2
    assert (out / "probe.png").stat().st_size > 10_000


def test_the_cutoff_itself_is_a_low_frequency():
    wave = torch.cos(torch.arange(64) * (2 * torch.pi * 4 / 64))  # four cycles
    images = (127.5 + 100 * wave).round().to(torch.uint8).expand(1, 3, 64, 64)
    assert (filtered(images, 4, keep="low").int() - images.int()).abs().max() <= 1
    assert filtered(images, 4, keep="high").float().std() < 1
