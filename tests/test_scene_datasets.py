"""Scenes as LAVIS sees them: found in the registry, built from the shipped configuration, collated, retrieved."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import default_collate

from lavis_xformer.data.scenes import ANSWERS, QUESTION_KINDS, captions, make_scene, render
from lavis_xformer.errors import UserError
from lavis_xformer.images import CLIP_MEAN, CLIP_STD


def build(name, *changes):
    """Datasets of a builder: its shipped configuration, small, with dotted ``key=value`` changes."""
    builder = registry.get_builder_class(name)
    config = OmegaConf.load(builder.default_config_path()).datasets[name]
    sizes = [f"splits.{split}.scenes=12" for split in ("train", "val", "test")]
    merged = OmegaConf.merge(config, OmegaConf.from_dotlist([*sizes, *changes]))
    return builder(merged).build_datasets()


def test_shipped_configuration_builds_through_lavis():
    datasets = load_dataset("xformer_scenes")
    assert {split: len(dataset) for split, dataset in datasets.items()} == {
        "train": 100_000,
        "val": 1000,
        "test": 1000,
    }
    assert datasets["train"][99_999]["image"].shape == (6, 64, 64)
    with pytest.raises(IndexError):
        datasets["train"][100_000]


def test_training_pairs_hold_the_picture_and_every_caption_of_their_scene():
    train = build("xformer_scenes")["train"]
    assert len(train) == 60
    for number in (0, 4, 5, 59):
        sample, index = train[number], number // 5
        scene = make_scene(0, "train", index)
        expected = torch.from_numpy(render(scene)).permute(2, 0, 1) / 255
        clip = sample["image"][:3] * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
        torch.testing.assert_close(clip, expected)
        assert sample["text_input"] == captions(scene, "medium", 5)[number % 5]
        assert (sample["image_id"], sample["instance_id"]) == (index, str(number))


@pytest.mark.parametrize("split", ["train", "val"])
def test_pairs_collate_as_lavis_collates(split):
    dataset = build("xformer_scenes")[split]
    for batch in (next(iter(DataLoader(dataset, 3))), next(iter(DataLoader(dataset, 3, collate_fn=dataset.collater)))):
        assert batch["image"].shape == (3, 6, 64, 64)
        assert len(batch["text_input"]) == 3
        assert isinstance(batch["text_input"][0], str)
        assert batch["image_id"].tolist() == ([0, 0, 0] if split == "train" else [0, 1, 2])


def test_evaluation_pairs_carry_the_tables_of_retrieval():
    val = build("xformer_scenes", "splits.val.captions_per_image=3")["val"]
    assert len(val) == len(val.image) == 12
    assert len(val.text) == 36
    for image, texts in val.img2txt.items():
        assert [val.txt2img[text] for text in texts] == [image] * 3
        scene = make_scene(0, "val", image)
        assert [val.text[text] for text in texts] == captions(scene, "medium", 3)
        assert val[image]["text_input"] == val.text[texts[0]]
        assert val[image]["index"] == image


def test_loading_in_workers_equals_loading_here_and_cached_equals_painted():
    plain = build("xformer_scenes")["train"]
    cached = build("xformer_scenes", "cached=true")["train"]
    here = default_collate([plain[number] for number in range(60)])
    loaded = list(DataLoader(cached, 20, num_workers=2))
    assert torch.equal(here["image"], torch.cat([batch["image"] for batch in loaded]))
    assert here["text_input"] == [text for batch in loaded for text in batch["text_input"]]


def test_splits_share_no_picture():
    datasets = build("xformer_scenes")
    pictures = [d.source.paint(index).tobytes() for d in datasets.values() for index in range(12)]
    assert len(set(pictures)) == 36


def test_seed_size_captions_and_processors_are_those_of_the_configuration():
    levels = [f"splits.{split}.captions=fine" for split in ("train", "val", "test")]
    built = build("xformer_scenes", "seed=3", "image_size=32", "vis_processor.eval.image_size=16", *levels)
    for split, side in (("train", 64), ("val", 16), ("test", 16)):
        scene = make_scene(3, split, 0)
        assert (built[split].source.paint(0) == render(scene, 32)).all()
        assert built[split][0]["text_input"] == captions(scene, "fine", 1)[0]
        assert built[split][0]["image"].shape == (6, side, side)


def test_a_split_of_no_scenes_is_left_out():
    assert set(build("xformer_scenes", "splits.test.scenes=0")) == {"train", "val"}


def test_questions_take_turns_and_belong_to_their_picture():
    test = build("xformer_scenes_vqa")["test"]
    assert len(test) == 96
    samples = [test[number] for number in range(96)]
    assert Counter(sample["kind"] for sample in samples) == dict.fromkeys(QUESTION_KINDS, 12)
    assert [sample["question_id"] for sample in samples] == list(range(96))
    for sample in samples:
        scene = make_scene(0, "test", sample["image_id"])
        if re.fullmatch(
            r"(how many objects are (there|in the image)|what is the number of objects)\?", sample["text_input"]
        ):
            assert sample["answers"] == [str(len(scene.objects))]
        assert sample["answers"][0] in ANSWERS
    replaced = {sample["image_id"] for sample in samples if sample["image_id"] >= 12}
    assert replaced  # scenes beyond the split's last stand in where a kind can't be asked


def test_questions_collate_into_lavis_vqa_batches():
    train = build("xformer_scenes_vqa")["train"]
    batch = next(iter(DataLoader(train, 5, collate_fn=train.collater)))
    assert batch["image"].shape == (5, 6, 64, 64)
    assert [[answer] for answer in batch["answer"]] == batch["answers"]
    assert batch["weight"].tolist() == [1.0] * 5
    assert batch["n_answers"].tolist() == [1] * 5
    assert batch["question_id"].tolist() == [0, 1, 2, 3, 4]
    assert batch["kind"] == list(QUESTION_KINDS[:5])
    assert train.answer_list == ANSWERS


def test_a_dialogue_has_all_questions_of_its_scene():
    dialogue = ["splits.train.dialogue=true", "splits.train.questions_per_image=6"]
    train = build("xformer_scenes_vqa", *dialogue)["train"]
    assert len(train) == 12
    batch = next(iter(DataLoader(train, 4, collate_fn=train.collater)))
    assert batch["image_id"].tolist() == [0, 1, 2, 3]
    assert batch["n_answers"].tolist() == [1] * 4
    for index, asked, said in zip(range(4), batch["text_input"], batch["answer"], strict=True):
        assert len(set(asked)) == len(asked) == len(said)
        assert 1 <= len(asked) <= 6
        count = str(len(make_scene(0, "train", index).objects))
        told = dict(zip(asked, said, strict=True))
        counted = [a for q, a in told.items() if re.search("many objects|number of objects", q)]
        assert set(counted) <= {count}
        assert set(said) <= set(ANSWERS)
    more = build("xformer_scenes_vqa", *dialogue, "splits.train.details_per_image=2")["train"]
    wanted = [sum(bool(re.match("what is the (?!number)", q)) for q in row["question"]) for row in more.annotation]
    assert max(wanted) == 2
    listed = build("xformer_scenes_vqa", *dialogue, "splits.train.inventory=true")["train"].annotation[3]
    said = listed["answer"][0][-1].split(". ")
    scene = make_scene(0, "train", 3)
    assert listed["question"][-1] == "what objects are there?"
    assert [text.split(": ")[0] for text in said] == [o.name for o in sorted(scene.objects, key=lambda o: o.x)]
    few = build("xformer_scenes_vqa", "kinds=[relation]", "splits.train.dialogue=true")["train"]
    assert any(row["image_id"] >= 12 for row in few.annotation), "another scene stands in where nothing can be asked"


def test_several_presets_take_turns():
    splits = build("xformer_scenes", "preset=[easy,standard]")
    for index, row in enumerate(splits["train"].annotation[::5]):
        preset = ("easy", "standard")[index % 2]
        assert row["caption"] == captions(make_scene(0, "train", index, preset), "medium", 1)[0]


@pytest.mark.parametrize("each", [1, 2, 4, 8])
def test_every_kind_is_asked_as_often_about_scenes_of_every_preset(each):
    scenes = 48 // each
    changes = "preset=[easy,fine,standard]", f"splits.val.scenes={scenes}", f"splits.val.questions_per_image={each}"
    rows = build("xformer_scenes_vqa", *changes)["val"].annotation
    assert set(Counter((row["kind"], row["image_id"] % 3) for row in rows).values()) == {2}
    alone = build("xformer_scenes_vqa", "preset=fine", *changes[2:], f"splits.val.scenes={scenes // 3}")["val"]
    assert [row["kind"] for row in rows if row["image_id"] % 3 == 1] == [row["kind"] for row in alone.annotation]


def test_questions_of_one_kind_about_one_scene_differ():
    changes = "kinds=[count_group]", "splits.val.scenes=8", "splits.val.questions_per_image=6"
    rows = list(build("xformer_scenes_vqa", *changes)["val"].annotation)
    asked = [{row["question"] for row in rows[start : start + 6]} for start in range(0, 48, 6)]
    assert sum(len(questions) > 2 for questions in asked) >= 6


def test_a_scene_that_stands_in_is_of_the_same_preset():
    changes = "preset=[easy,standard]", "kinds=[relation]", "splits.val.scenes=13", "splits.val.questions_per_image=1"
    rows = list(build("xformer_scenes_vqa", *changes)["val"].annotation)
    assert any(row["image_id"] >= 13 for row in rows)
    assert [row["image_id"] % 2 for row in rows] == [number % 2 for number in range(13)]


def test_chosen_kinds_only():
    train = build("xformer_scenes_vqa", "kinds=[count,relation]")["train"]
    assert Counter(row["kind"] for row in train.annotation) == {"count": 48, "relation": 48}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("xformer_scenes", "preset=standart", "did you mean 'standard'"),
        ("xformer_scenes", "preset=[easy,standart]", "did you mean 'standard'"),
        ("xformer_scenes", "preset=[]", "preset: ''; there is"),
        ("xformer_scenes", "preset=null", "preset: 'None'; "),
        ("xformer_scenes", "preset=3", "preset: '3'; "),
        ("xformer_scenes", "splits.train=5", r"splits\.train is 5; it must hold keys such as scenes"),
        ("xformer_scenes", "splits.train.captions=medum", "did you mean 'medium'"),
        ("xformer_scenes", "splits.train.scene=3", "splits.train: 'scene'; did you mean 'scenes'"),
        ("xformer_scenes", "splits.valid.scenes=3", "splits: 'valid'; did you mean 'val'"),
        ("xformer_scenes", "splits.train.scenes=many", r"splits\.train\.scenes is 'many'; it must be a whole number"),
        ("xformer_scenes", "seed=-1", "seed is -1"),
        ("xformer_scenes", "vis_processor.eval=null", "vis_processor has no 'eval'"),
        ("xformer_scenes_vqa", "kinds=[counts]", "did you mean 'count'"),
        ("xformer_scenes_vqa", "splits.val.dialogue=true", "splits.val.dialogue: only 'train'"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(name, change, message):
    with pytest.raises(UserError, match=message):
        build(name, change)
