"""Scenes are replayable, disjoint between splits, visible, and fast to make."""

from __future__ import annotations

import itertools
import time
from dataclasses import astuple, replace
from itertools import combinations
from math import dist

import numpy as np
import pytest
import torch

import lavis_xformer
from lavis_xformer.data.scenes import PRESETS, QUESTION_KINDS, make_scene, relations, render, visible_shares
from lavis_xformer.data.scenes.sheet import main
from lavis_xformer.data.scenes.sprites import AREAS, sprite
from lavis_xformer.data.scenes.words import COLOURS, FACINGS, GROUNDS, MARKS, SHAPES
from lavis_xformer.data.scenes.world import DIAMETERS
from lavis_xformer.errors import UserError


def scenes(preset="standard", count=300, split="val", seed=0):
    return [make_scene(seed, split, index, preset) for index in range(count)]


@pytest.mark.parametrize("preset", PRESETS)
def test_same_arguments_give_the_same_scene_and_picture(preset):
    first, again = scenes(preset, 20), scenes(preset, 20)
    assert first == again
    assert all((render(a) == render(b)).all() for a, b in zip(first, again, strict=True))


def test_seeds_splits_and_indices_give_different_scenes_and_pictures():
    groups = [scenes(count=40, split=split, seed=seed) for split in ("train", "val", "test") for seed in (0, 1)]
    every = [scene for group in groups for scene in group]
    assert len({astuple(scene)[:2] for scene in every}) == len(every)
    assert len({render(scene).tobytes() for scene in every}) == len(every)


@pytest.mark.parametrize("size", [32, 64, 100])
def test_pictures_are_rgb_of_the_wanted_size(size):
    for scene in scenes(count=30):
        picture = render(scene, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 3


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_and_grounds_keep_to_the_preset(preset):
    rules, drawn = PRESETS[preset], scenes(preset, 600)
    assert {len(scene.objects) for scene in drawn} == set(range(rules.objects[0], rules.objects[1] + 1))
    assert {scene.ground.name for scene in drawn} == set(rules.grounds)
    assert max(len(scene.groups()) for scene in drawn) == rules.kinds
    every = [item for scene in drawn for item in scene.objects]
    assert {item.shape for item in every} == set(SHAPES)
    assert {item.colour for item in every} == set(COLOURS)
    assert {item.mark for item in every} == set(MARKS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_object_stays_mostly_visible(preset):
    for scene in scenes(preset, 60):
        whole = render(scene).astype(int)
        shares = visible_shares(scene.objects)
        assert shares.min() >= PRESETS[preset].visible
        for number, (item, share) in enumerate(zip(scene.objects, shares, strict=True)):
            rest = (*scene.objects[:number], *scene.objects[number + 1 :])
            gone = np.abs(whole - render(replace(scene, objects=rest))).sum(-1) > 0
            covered = np.count_nonzero(item.sprite(64).alpha > 0.5)
            assert np.count_nonzero(gone) >= 0.8 * share * covered  # what it alone changes in the picture


def test_objects_are_painted_where_they_are_in_their_colour_and_size():
    for scene in scenes("easy", 80):
        empty = render(replace(scene, objects=())).astype(int)
        for item in scene.objects:
            low, high = DIAMETERS[item.size]
            assert low <= item.diameter <= high
            if item.shape not in ("circle", "square", "cross") or item.mark != "plain":
                continue
            picture = render(replace(scene, objects=(item,)))
            rows, columns = (np.abs(picture - empty).sum(-1) > 0).nonzero()
            x, y = columns.mean(), rows.mean()
            assert (x, y) == pytest.approx((64 * item.x, 64 * item.y), abs=1.5)
            seen = picture[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].mean((0, 1))  # in its middle
            assert item.colour == min(COLOURS, key=lambda name, seen=seen: np.abs(seen - COLOURS[name]).sum())


@pytest.mark.parametrize("facing", FACINGS)
def test_a_triangle_points_the_way_it_faces(facing):
    item = replace(scenes(count=1)[0].objects[0], shape="triangle", mark="plain", facing=facing, tilt=0)
    alpha = item.sprite(64).alpha
    half = len(alpha) // 2
    parts = {"up": alpha[:half], "down": alpha[half:], "left": alpha[:, :half], "right": alpha[:, half:]}
    assert min(parts, key=lambda name: parts[name].sum()) == facing


def test_objects_are_larger_than_a_patch_and_inside_the_picture():
    for item in (item for scene in scenes() for item in scene.objects):
        top, left, side = item.box(64)
        assert side > 8
        assert min(top, left) >= 0
        assert max(top, left) + side <= 64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [11, 18, 26])
def test_every_mark_changes_the_look_of_every_shape(shape, side):
    sprites = [sprite(shape, mark, side, 0) for mark in MARKS]
    looks = [drawn.alpha * (1 - 0.8 * drawn.ink) for drawn in sprites]
    for first, second in itertools.combinations(looks, 2):
        assert np.abs(first - second).sum() > 0.03 * side**2


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_those_of_the_drawn_shapes(shape):
    assert sprite(shape, "plain", 64, 0).alpha.mean() == pytest.approx(AREAS[shape], abs=0.01)


def test_marks_look_different_in_the_picture():
    scene = next(scene for scene in scenes() if len(scene.objects) == 1)
    item = scene.objects[0]
    looks = {render(replace(scene, objects=(replace(item, mark=mark),))).tobytes() for mark in MARKS}
    assert len(looks) == len(MARKS)


def test_grounds_look_different():
    scene = replace(scenes(count=1)[0], objects=())
    looks = {render(replace(scene, ground=replace(scene.ground, name=name))).tobytes() for name in GROUNDS}
    assert len(looks) == len(GROUNDS)


def test_ground_truth_equals_a_naive_count():
    for scene in scenes():
        for shape, colour in itertools.product(SHAPES, COLOURS):
            naive = sum(1 for item in scene.objects if item.shape == shape and item.colour == colour)
            assert scene.count(shape=shape, colour=colour) == naive
            assert scene.groups()[colour, shape] == naive


def test_relations_are_opposite_seen_from_the_other_side():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene in scenes():
        for a, b in itertools.combinations(scene.objects, 2):
            assert [opposite[name] for name in relations(a, b)] == relations(b, a)
            assert ("left of" in relations(a, b)) == (a.x <= b.x - 0.12)
            assert ("above" in relations(a, b)) == (a.y <= b.y - 0.12)


def test_the_largest_is_larger_than_all_others():
    found = 0
    for scene in scenes():
        largest = scene.largest()
        for other in scene.objects:
            if largest is not None and other is not largest:
                assert largest.area >= other.area * 1.33
                assert largest.diameter >= other.diameter
                found += 1
    assert found > 100


def test_covered_area_tells_little_of_the_number_of_objects():
    drawn = scenes(count=1000)
    numbers = np.array([len(scene.objects) for scene in drawn])
    areas = np.array([sum(item.area for item in scene.objects) for scene in drawn])
    nearest = np.array([areas[numbers == number].mean() for number in range(1, 10)])
    guesses = 1 + np.abs(areas[:, None] - nearest).argmin(1)
    assert (guesses == numbers).mean() < 0.3


def test_scenes_are_made_faster_than_they_are_used():
    model, *_ = lavis_xformer.load_model_and_preprocess("xformer", "mini")
    batch = {"image": torch.zeros(16, 6, 64, 64), "text_input": ["a red star and two blue squares"] * 16}
    [render(scene) for scene in scenes(count=300)]  # fill the cache of sprites
    spent = []
    for work in (model, model, lambda _: [render(scene) for scene in scenes(count=16, seed=1)]):  # the first warms up
        start = time.process_time()
        done = work(batch)
        if work is model:
            done["loss"].backward()
        spent.append(time.process_time() - start)
    _, step, drawing = spent
    assert drawing < step / 2, "of the main job, on one core each"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'standard'"):
        make_scene(0, "train", 0, "standart")


def test_answers_are_counted(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "scenes.png"), "--answers", "300"]) == 0
    _, title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == "share by wording most frequent answer".split()
    shares, worded = ({line.split()[0]: float(line.split()[column]) for line in lines} for column in (1, 3))
    assert list(shares) == list(QUESTION_KINDS)
    assert 50 <= shares["presence"] < 57, "one of two"
    assert 25 <= shares["relation"] < 35, "one of four"
    assert 11 < shares["count"] < 17, "one of nine"
    assert 50 <= worded["relation"] < 60, "one of the two sides that are offered"
    assert all(worded[kind] >= shares[kind] for kind in shares)


def test_contact_sheet_is_written(tmp_path, capsys):
    path = tmp_path / "scenes.png"
    assert main(["--out", str(path), "--preset", "fine"]) == 0
    assert path.stat().st_size > 50_000
    assert str(path) in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere"):
        main(["--out", str(tmp_path / "nowhere" / "scenes.png")])
    with pytest.raises(SystemExit):
        main(["--split", "tset"])
    assert "invalid choice: 'tset'" in capsys.readouterr().err


def test_objects_overlap_no_more_than_their_preset_allows():
    for preset, rules in PRESETS.items():
        for index in range(40):
            for a, b in combinations(make_scene(5, "val", index, preset).objects, 2):
                apart = (1 - rules.overlap) * (a.diameter + b.diameter) / 2
                assert dist((a.x, a.y), (b.x, b.y)) >= apart - 1e-9
