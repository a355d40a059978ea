"""Bad samples are named, counted and skipped, or fatal, in this process and in workers."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.datasets.datasets.caption_datasets import CaptionDataset
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.functional import to_tensor

from lavis_xformer.data.guard import DataFault, GuardedDataset, StreamGuard, guard, sample_name
from lavis_xformer.data.packed import PackedRows


def stock(folder: Path, bad: tuple[int, ...] = (), n: int = 6) -> CaptionDataset:
    """LAVIS's own dataset of n images, those named in bad cut in half."""
    rows = []
    for i in range(n):
        path = folder / f"{i}.png"
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:40])
        rows.append({"image": path.name, "caption": f"number {i}", "image_id": i})
    (folder / "rows.json").write_text(json.dumps(rows))
    return CaptionDataset(to_tensor, str, str(folder), [str(folder / "rows.json")])


def test_annotations_by_the_thousand_are_packed_and_read_alike(tmp_path, monkeypatch):
    rows = [{"image": f"{i}.png", "caption": ["a", "ü"], "size": (i, None)} for i in range(50)]
    packed = PackedRows(rows)
    assert list(packed) == rows
    assert (packed[-1], packed[3:9:2], len(packed)) == (rows[-1], rows[3:9:2], 50)
    with pytest.raises(IndexError):
        packed[50]
    assert isinstance(guard(stock(tmp_path)).annotation, list)
    monkeypatch.setattr("lavis_xformer.data.guard.MANY", 6)
    dataset = guard(stock(tmp_path, bad=(2,)))
    assert isinstance(dataset.annotation, PackedRows)
    assert [dataset[i]["text_input"] for i in range(3)] == ["number 0", "number 1", "number 3"]
    assert dataset.corrupt() == [f"{tmp_path}/2.png (sample 2)"]


def test_of_many_bad_samples_a_few_are_told_one_by_one(tmp_path, caplog):
    dataset = GuardedDataset(stock(tmp_path, bad=range(25), n=2100), max_in_a_row=100)
    for number in range(2000):
        dataset._note(number, "torn")
    assert len(caplog.records) == 20 + 2
    assert caplog.records[-1].message == "skipped a bad sample (2000 so far in this process): torn"


def test_a_good_dataset_is_unchanged(tmp_path: Path) -> None:
    dataset = stock(tmp_path)
    guarded = GuardedDataset(dataset)
    assert [s["text_input"] for s in guarded] == [s["text_input"] for s in dataset]
    assert guarded.corrupt() == []
    assert guarded.annotation is dataset.annotation
    assert not hasattr(guarded, "txt2img")


def test_skipping_takes_the_next_good_sample_and_counts_each_file_once(tmp_path: Path, caplog) -> None:
    guarded = GuardedDataset(stock(tmp_path, bad=(1, 2, 5)))
    for _ in range(2):
        assert [s["image_id"] for s in guarded] == [0, 3, 3, 3, 4, 0]
    assert [Path(name).name for name in guarded.corrupt()] == [
        "1.png (sample 1)",
        "2.png (sample 2)",
        "5.png (sample 5)",
    ]
    assert len(caplog.records) == 3, "and tells it once"


def test_half_a_photo_is_bad_even_when_pil_was_told_to_be_lenient(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as LAVIS's import does
    guarded, path = GuardedDataset(stock(tmp_path)), tmp_path / "1.png"
    Image.effect_noise((32, 32), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert Image.open(path).convert("RGB").size == (32, 32), "by itself, half of it grey"
    assert guarded[1]["image_id"] == 2


def test_what_a_guard_inside_refuses_is_not_skipped_outside(tmp_path: Path) -> None:
    inside = GuardedDataset(stock(tmp_path, bad=(1,)), on_corrupt="raise")
    with pytest.raises(DataFault, match=r"1\.png \(sample 1\): .*\(run\.on_corrupt=skip goes on without it\)$"):
        GuardedDataset(Subset(inside, range(6)))[1]


def test_raising_names_the_file(tmp_path: Path) -> None:
    guarded = GuardedDataset(stock(tmp_path, bad=(1,)), on_corrupt="raise")
    with pytest.raises(DataFault, match=r"1\.png \(sample 1\): "):
        guarded[1]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_report_to_the_main_process(tmp_path: Path, method: str) -> None:
    guarded = GuardedDataset(stock(tmp_path, bad=(4,)))
    loader = DataLoader(
        guarded,
        2,
        num_workers=1,
        collate_fn=guarded.collater,
        multiprocessing_context=method,
        shuffle=False,
    )
    assert torch.cat([b["image_id"] for b in loader]).tolist() == [0, 1, 2, 3, 5, 5]
    assert len(guarded.corrupt()) == 1


def test_a_worker_raises_one_line(tmp_path: Path) -> None:
    guarded = GuardedDataset(stock(tmp_path, bad=(4,)), on_corrupt="raise")
    with pytest.raises(DataFault) as error:
        list(DataLoader(guarded, 2, num_workers=1, collate_fn=guarded.collater))
    assert str(error.value).startswith(str(tmp_path / "4.png"))
    assert "\n" not in str(error.value)


def test_a_dataset_that_vanishes_raises_instead_of_searching_for_ever(tmp_path: Path) -> None:
    guarded = GuardedDataset(stock(tmp_path), max_in_a_row=4)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(DataFault, match=r"4 bad samples in a row.*3\.png"):
        guarded[0]


def test_a_broken_row_is_skipped_too(tmp_path: Path) -> None:
    dataset = stock(tmp_path)
    del dataset.annotation[2]["caption"]
    guarded = GuardedDataset(dataset)
    assert guarded[2]["image_id"] == 3
    with pytest.raises(DataFault, match=r"2\.png \(sample 2\): no key 'caption'"):
        GuardedDataset(dataset, on_corrupt="raise")[2]


def test_names_reach_into_joined_datasets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    joined = ConcatDataset([stock(tmp_path / "a"), stock(tmp_path / "b", bad=(0,))])
    assert sample_name(joined, 6) == f"{tmp_path / 'b' / '0.png'} (sample 0)"
    assert GuardedDataset(joined)[6]["image_id"] == 1
    assert sample_name([1, 2], 1) == "sample 1 of list"


def test_the_faults_of_a_stream_cost_the_same_however_many_there_were(caplog) -> None:
    caplog.set_level("CRITICAL")
    skipping = StreamGuard(max_in_a_row=10**9)
    start = time.process_time()
    for number in range(8000):
        skipping.sample_fault(OSError("torn"))
        skipping._present = f"/data/laion/00000.tar ({number:09d})"
    assert time.process_time() - start < 5
    assert len(skipping.corrupt()) == 8000


def test_of_a_streams_many_faults_a_few_are_told_one_by_one(caplog) -> None:
    skipping = StreamGuard(max_in_a_row=10**9)
    for number in range(2000):
        skipping._present = f"00000.tar ({number})"
        skipping.sample_fault(OSError("torn"))
    assert len(caplog.records) == 20 + 2
    assert caplog.records[-1].message.endswith("(2000 so far in this process): 00000.tar (1999): torn")


def test_a_streams_faults_in_a_row_end_it_and_a_good_sample_begins_anew() -> None:
    skipping = StreamGuard(max_in_a_row=3)
    watched = skipping.watch(iter([1]), source="x.tar")
    for _ in range(2):
        skipping.sample_fault(OSError("torn"))
    next(watched)
    for _ in range(2):
        skipping.sample_fault(OSError("torn"))
    with pytest.raises(DataFault, match="3 bad samples in a row"):
        skipping.sample_fault(OSError("torn"))
    with pytest.raises(DataFault, match=r"no sample can be read from x\.tar"):
        list(skipping.watch(iter([]), source="x.tar"))


def test_a_name_in_a_shard_may_be_of_any_encoding() -> None:
    skipping = StreamGuard()
    skipping._present = "00000.tar (caf\udce9)"  # as Python reads Latin-1 from a tar file
    for _ in range(2):
        skipping.sample_fault(OSError("torn"))
    assert skipping.corrupt() == ["00000.tar (caf\\udce9)"]


def test_a_streams_guard_knows_what_another_process_has_named() -> None:
    here = StreamGuard()
    there = pickle.loads(pickle.dumps(here))
    here.sample_fault(OSError("torn"))
    there.sample_fault(OSError("torn"))
    there._present = "another"
    there.sample_fault(OSError("torn"))
    assert here.corrupt() == there.corrupt() == ["a sample", "another"]
    assert len(here._names.read_text().splitlines()) == 2


def test_guard_wraps_once_and_leaves_streams_alone(tmp_path: Path) -> None:
    guarded = guard(stock(tmp_path), on_corrupt="raise")
    assert guard(guarded) is guarded
    stream = iter([1])
    assert guard(stream) is stream


def test_no_way_of_reading_leads_past_the_guard(tmp_path: Path) -> None:
    part = guard(Subset(stock(tmp_path, bad=(1,)), range(6)))  # torch's loader asks it for whole batches
    assert next(iter(DataLoader(part, 3)))["image_id"].tolist() == [0, 2, 2]


def test_an_index_beyond_the_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        GuardedDataset(stock(tmp_path))[6]
