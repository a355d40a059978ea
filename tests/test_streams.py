"""Shards through the runner: nothing twice, nothing lost, resumed to the bit, on workers and processes."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import toy_training
import webdataset as wds
from lavis.datasets.datasets.laion_dataset import LaionDataset
from PIL import Image
from test_distributed_training import torchrun
from torchvision.transforms.functional import to_tensor

from lavis_xformer.data.guard import DataFault, StreamGuard
from lavis_xformer.engine.state import Corrupt
from lavis_xformer.engine.streams import JoinedLoader, ShardStream, StreamLoader
from lavis_xformer.errors import UserError

SHARDS, PER_SHARD = 8, 6


def write_shards(folder, *, bad=()):
    """Shards of ``PER_SHARD`` pairs whose captions are c0, c1, ...; the images of ``bad`` are torn."""
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                picture = io.BytesIO()
                Image.new("RGB", (4, 4), (4 * number, 0, 0)).save(picture, "png")
                content = picture.getvalue()[: 40 if number in bad else None]
                for suffix, data in (("jpg", content), ("json", json.dumps({"caption": f"c{number}"}).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/{{0..{SHARDS - 1}}}.tar"


def augment(image):
    """A vector for ``toy_training``'s model that tells the image and draws from every random source."""
    return to_tensor(image).mean() + torch.arange(toy_training.WIDTH) / 10 + 0.01 * torch.rand(())


def caption(text):
    return f"c{int(text[1:]) % 4}"


def pipeline(location, text=str):
    return LaionDataset(vis_processor=augment, text_processor=text, location=location).inner_dataset


def stream(location, **options):
    return ShardStream(pipeline(location), seed=1, guard=StreamGuard(), **options)


@pytest.fixture(scope="module")
def location(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def words(batches):
    return [text for batch in batches for text in batch["text_input"]]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_pass_gives_every_sample_once_on_any_number_of_workers(location, workers):
    batches = SHARDS * PER_SHARD // 4
    loader = StreamLoader(stream(location), batches=batches, batch_size=4, num_workers=workers)
    orders = []
    for epoch in (0, 1):
        loader.start(epoch=epoch)
        orders.append(words(islice(loader, batches)))
        assert sorted(orders[-1]) == sorted(f"c{i}" for i in range(SHARDS * PER_SHARD))
    assert orders[0] != orders[1]


def test_processes_share_the_shards(location, monkeypatch):
    from lavis_xformer.engine import streams

    seen = []
    monkeypatch.setattr(streams, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(streams, "rank", lambda rank=rank: rank)
        seen += [sample["text_input"] for sample in islice(stream(location, lanes=2), SHARDS * PER_SHARD // 2)]
    assert len(set(seen)) == SHARDS * PER_SHARD


def test_a_longer_epoch_begins_anew_only_when_all_has_come(location):
    counts = Counter(sample["text_input"] for sample in islice(stream(location), 2 * SHARDS * PER_SHARD + 5))
    assert set(counts.values()) == {2, 3}
    assert len(counts) == SHARDS * PER_SHARD


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_batches_goes_on_where_the_epoch_was(location, workers):
    loader = StreamLoader(stream(location), batches=9, batch_size=4, num_workers=workers)
    before = torch.get_rng_state()
    whole = list(islice(loader, 9))
    loader.start(epoch=0, skip_batches=4)
    rest = list(islice(loader, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert words(rest) == words(whole[4:])
    for left, right in zip(rest, whole[4:], strict=True):
        assert torch.equal(left["image"], right["image"])


def test_every_epoch_and_every_seed_draws_its_own_augmentations(location):
    def drawn(seed, epoch):
        samples = ShardStream(pipeline(location), seed=seed, guard=StreamGuard())
        samples.epoch = epoch
        first = list(islice(samples, 6))  # see ``augment``: the mean of the picture, and what was drawn
        return [round(float(s["image"][0]) - 4 * int(s["text_input"][1:]) / 255 / 3, 6) for s in first]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({*drawn(1, 0), *drawn(1, 1), *drawn(2, 0)}) == 18


def test_a_pipeline_that_splits_itself_is_not_split_twice(location):
    own = wds.DataPipeline(
        wds.SimpleShardList(location), wds.split_by_node, wds.split_by_worker, wds.tarfile_to_samples()
    )
    keys = [sample["__key__"] for sample in islice(ShardStream(own, seed=1, guard=StreamGuard()), SHARDS * PER_SHARD)]
    assert len(set(keys)) == SHARDS * PER_SHARD


def test_every_pattern_of_a_list_is_expanded_and_missing_shards_are_told_at_once(location, caplog):
    patterns = [str(Path(location).with_name(name)) for name in ("{0..1}.tar", "{7..9}.tar")]
    shards = ShardStream(pipeline(patterns), seed=1, guard=StreamGuard()).urls
    assert [Path(shard).stem[-1] for shard in shards] == list("01789")
    assert "2 of 5 shards are missing: " in caplog.text


def test_too_few_shards_and_foreign_streams_are_refused(location):
    with pytest.raises(UserError, match=r"there are 8 shards .* for 9 lanes"):
        stream(location, lanes=9)
    with pytest.raises(UserError, match="DataPipeline does not begin with a list of shards"):
        ShardStream(wds.DataPipeline([{"a": 1}]), seed=1, guard=StreamGuard())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torn_image_is_skipped_and_named(tmp_path, workers):
    skipping = StreamGuard()
    data = ShardStream(pipeline(write_shards(tmp_path / "a", bad=[3, 20])), seed=1, guard=skipping)
    loader = StreamLoader(data, batches=1, batch_size=2, num_workers=workers)
    assert {"c3", "c20"}.isdisjoint(words(islice(loader, SHARDS * PER_SHARD)))
    assert skipping.corrupt() == [f"{tmp_path}/a/0.tar (0003)", f"{tmp_path}/a/3.tar (0020)"]


def test_or_ends_the_run_with_its_name(tmp_path):
    place = write_shards(tmp_path / "a", bad=[3, 20])
    runner = make_runner(tmp_path, place, on_corrupt="raise", max_epoch=3)
    with pytest.raises(UserError, match=r"a/[03]\.tar \(00(03|20)\): not an image"):
        runner.train()
    assert make_runner(tmp_path, place).train()["corrupt"]


def test_a_run_counts_all_bad_samples_and_keeps_the_first_names(monkeypatch):
    monkeypatch.setattr(Corrupt, "MOST", 2)
    corrupt = Corrupt()
    corrupt.update("cab")
    assert (corrupt.names, corrupt.count) == (["a", "b"], 3)
    again = Corrupt(corrupt.names, corrupt.count)
    for found in ("b", "bd"):  # after a restart
        again.update(found)
    assert (again.names, again.count) == (["a", "b"], 4)
    assert Corrupt(["a", "b"]).count == 2, "of a checkpoint without a count"


def test_a_torn_shard_is_named_and_the_others_are_read(tmp_path):
    place = write_shards(tmp_path / "a")
    torn = tmp_path / "a" / "4.tar"
    torn.write_bytes(torn.read_bytes()[:2600])
    skipping = StreamGuard()
    samples = ShardStream(pipeline(place), seed=1, guard=skipping)
    seen = {sample["text_input"] for sample in islice(samples, 2 * SHARDS * PER_SHARD)}
    assert {f"c{i}" for i in range(SHARDS * PER_SHARD) if i // PER_SHARD != 4} <= seen
    assert skipping.corrupt() == [str(torn)]


@pytest.mark.parametrize("on_corrupt", ["skip", "raise"])
def test_shards_that_vanish_end_in_one_line(tmp_path, on_corrupt):
    place = write_shards(tmp_path / "a")
    data = ShardStream(pipeline(place), seed=1, guard=StreamGuard(on_corrupt=on_corrupt))
    samples = iter(data)
    next(samples)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(DataFault, match=r"no sample can be read from|a/\d\.tar: No such file or directory"):
        list(islice(samples, 10_000))


def test_loaders_take_turns_in_their_shares_and_go_on_after_a_skip(location):
    def joined():
        parts = [StreamLoader(stream(location), batches=n, batch_size=4) for n in (6, 3)]
        return JoinedLoader(parts, seed=1)

    loader = joined()
    whole = words(loader)
    assert len(loader) == 9
    assert len(whole) == 36
    loader.start(epoch=0, skip_batches=5)
    assert words(loader) == whole[20:]
    loader.start(epoch=1)
    assert words(loader) != whole


# --- through the runner -----------------------------------------------------------


def make_runner(folder, location, *, also_mapped=False, text=caption, **run):
    run = {"iters_per_epoch": 6, "max_epoch": 2, "batch_size_train": 4, **run}
    parts = {"shards": {"train": pipeline(location, text)}, "pairs": {"val": toy_training.ToyPairs(17)}}
    if also_mapped:
        parts["pairs"]["train"] = toy_training.ToyPairs(24)
    return toy_training.make_runner(folder, datasets=parts, **run)


@pytest.mark.parametrize(("workers", "also_mapped"), [(0, False), (2, False), (0, True)])
def test_a_stream_resumes_to_the_bit(location, tmp_path, workers, also_mapped):
    options = {"num_workers": workers, "also_mapped": also_mapped}
    first = make_runner(tmp_path, location, job_id="a", save_every_steps=4, keep_last=0, **options)
    first.train()
    assert first.state.position.steps == 12
    for name in ("checkpoint_0_step4.pth", "checkpoint_0.pth", "checkpoint_1_step8.pth"):
        path = str(first.output_dir / name)
        again = make_runner(tmp_path, location, job_id=name, resume_ckpt_path=path, **options)
        again.train()
        left, right = first.state.model.state_dict(), again.state.model.state_dict()
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_other_lanes_within_an_epoch_are_told(location, tmp_path, caplog):
    first = make_runner(tmp_path, location, job_id="a", save_every_steps=4, keep_last=0, num_workers=2)
    first.train()
    path = str(first.output_dir / "checkpoint_0_step4.pth")
    with caplog.at_level("WARNING"):
        make_runner(tmp_path, location, resume_ckpt_path=path).train()
    assert "(workers, processes) were (2, 1), now (0, 1)" in caplog.text


def test_ratios_and_iterations_of_an_epoch_are_checked(location, tmp_path):
    with pytest.raises(UserError, match="iters_per_epoch is 0; a stream of shards has no length"):
        make_runner(tmp_path, location, iters_per_epoch=0).train()
    with pytest.raises(UserError, match=r"one positive number for each of the 2 .*24 samples, a stream"):
        make_runner(tmp_path, location, also_mapped=True, train_dataset_ratios=[1]).train()
    runner = make_runner(tmp_path, location, also_mapped=True, train_dataset_ratios=[1, 2])
    assert [len(loader) for loader in runner.train_loader.loaders] == [2, 4]


def test_laviss_names_of_an_iteration_based_run_are_read(location, tmp_path):
    runner = make_runner(
        tmp_path, location, iters_per_epoch=None, iters_per_inner_epoch=5, max_iters=14, max_epoch=None
    )
    runner.train()
    assert (runner.state.position.steps, runner.max_epoch) == (15, 3)


def test_the_runs_seed_decides_the_order_of_a_stream(location, tmp_path):
    first, again, other = (
        words(islice(make_runner(tmp_path, location, job_id=name, seed=seed, text=str).train_loader, 6))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_iterations_alone_are_one_epoch(tmp_path):
    runner = toy_training.make_runner(tmp_path, max_iters=4, max_epoch=None)
    runner.train()
    assert (runner.state.position.steps, runner.max_epoch) == (4, 1)


def test_map_style_epochs_of_a_given_length_go_through_all_data(tmp_path):
    runner = toy_training.make_runner(tmp_path, iters_per_epoch=4, max_epoch=3, batch_size_train=8)
    indices = []
    for epoch in range(3):
        runner.train_loader.start(epoch=epoch)
        indices += [index for batch in runner.train_loader.batch_sampler for _, index in batch]
    assert len(indices) == 96
    assert Counter(indices) == dict.fromkeys(range(48), 2)


TWO_PROCESSES = """
import sys
from lavis_xformer import distributed, launch
import test_streams
with launch.process_group("cpu"):
    runner = test_streams.make_runner(sys.argv[1], sys.argv[2], job_id="x", num_workers=2, text=str)
    seen = test_streams.words(batch for batch, _ in zip(runner.train_loader, range(6)))
    open(f"{sys.argv[1]}/{distributed.rank()}", "w").write(" ".join(seen))
    test_streams.make_runner(sys.argv[1], sys.argv[2], job_id="y", num_workers=2).train()
"""


@pytest.mark.slow
def test_two_processes_with_workers_share_an_epoch(location, tmp_path, monkeypatch):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    done = torchrun(str(tmp_path), location, script=tmp_path / "two.py")
    assert done.returncode == 0, done.stderr
    seen = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert [len(part) for part in seen] == [24, 24]
    assert len({*seen[0], *seen[1]}) == SHARDS * PER_SHARD
