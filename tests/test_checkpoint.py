"""Checkpoint files are whole or recognised as not; names give their order; old ones go."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from lavis_xformer.engine import checkpoint, rng
from lavis_xformer.engine.state import Corrupt, TrainingState
from lavis_xformer.errors import UserError
from lavis_xformer.state_dicts import load_trainable, trainable_state

CONTENT = {"model": {"w": torch.arange(1000.0)}, "optimizer": {}, "epoch": 1}


def save(folder, *names):
    for name in names:
        checkpoint.write(folder / name, CONTENT)


def test_what_is_read_is_what_was_written_and_stock_torch_reads_it(tmp_path):
    save(tmp_path, "checkpoint_1.pth")
    read = checkpoint.read(tmp_path / "checkpoint_1.pth")
    assert torch.equal(read["model"]["w"], CONTENT["model"]["w"])
    assert torch.load(tmp_path / "checkpoint_1.pth", weights_only=True)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1.pth"]


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("zipfile.ZipFile.testzip", OSError(errno.EIO, "Input/output error")),
        ("zipfile.ZipFile.testzip", PermissionError(errno.EACCES, "Permission denied")),
        ("torch.load", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes")),
        ("torch.load", MemoryError()),
    ],
)
def test_what_may_pass_sets_no_checkpoint_aside(tmp_path, monkeypatch, where, error):
    path = tmp_path / checkpoint.name_of(0)
    checkpoint.write(path, {"model": {}, "optimizer": {}, "epoch": 0})

    def fail(*unused, **options):
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(where, fail)
        with pytest.raises(UserError, match=r"can't be read right now .*left as it is"):
            checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path) == path


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_a_torn_file_is_recognised(tmp_path, share):
    path = tmp_path / "checkpoint_1.pth"
    save(tmp_path, path.name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(checkpoint.BadCheckpoint, match="truncated or not a checkpoint"):
        checkpoint.read(path)


def test_one_altered_bit_of_a_weight_is_recognised(tmp_path):
    path = tmp_path / "checkpoint_1.pth"
    save(tmp_path, path.name)
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor([500.0, 501.0]).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(checkpoint.BadCheckpoint, match="checksum"):
        checkpoint.read(path)


@pytest.mark.parametrize(("offset", "value"), [(8, 0x01), (10, 0x63), (46, 0xFF)])  # flags, method, name
def test_one_altered_byte_of_the_directory_is_recognised_and_the_one_before_taken(tmp_path, offset, value):
    save(tmp_path, "checkpoint_0.pth", "checkpoint_1.pth")
    path = tmp_path / "checkpoint_1.pth"
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + offset] ^= value
    path.write_bytes(data)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "checkpoint_0.pth"


@pytest.mark.parametrize("content", [{"state": 1}, [1, 2]])
def test_another_file_of_torch_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(checkpoint.BadCheckpoint, match="no training state"):
        checkpoint.read(tmp_path / "x.pth")


def test_the_newest_good_one_is_found_and_bad_ones_are_set_aside(tmp_path):
    save(tmp_path, "checkpoint_0.pth", "checkpoint_1_step9.pth", "checkpoint_1_step10.pth")
    (tmp_path / "checkpoint_1.pth").write_bytes(b"PK torn")
    names = [path.name for path in checkpoint.listed(tmp_path)]
    assert names[:3] == ["checkpoint_1.pth", "checkpoint_1_step10.pth", "checkpoint_1_step9.pth"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "checkpoint_1_step10.pth"
    assert (tmp_path / "checkpoint_1.pth.bad").exists()


def test_the_best_is_resumed_where_nothing_else_is_whole(tmp_path):
    save(tmp_path, "checkpoint_1.pth", checkpoint.BEST)
    (tmp_path / "checkpoint_1.pth").write_bytes(b"PK torn")
    assert checkpoint.newest(tmp_path) == tmp_path / checkpoint.BEST
    (tmp_path / checkpoint.BEST).write_bytes(b"PK torn")
    assert checkpoint.newest(tmp_path) is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    save(tmp_path, "checkpoint_0.pth", "checkpoint_1_step9.pth", "checkpoint_1.pth", checkpoint.BEST)
    (tmp_path / ".checkpoint_2.pth.tmp").touch()
    checkpoint.prune(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_1.pth", checkpoint.BEST}


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    save(tmp_path, "checkpoint_1.pth")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        checkpoint.write(tmp_path / "checkpoint_1.pth", {**CONTENT, "epoch": 2})
    assert checkpoint.read(tmp_path / "checkpoint_1.pth")["epoch"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_an_alias_outlives_its_source(tmp_path):
    save(tmp_path, "checkpoint_1.pth")
    checkpoint.alias(tmp_path / "checkpoint_1.pth", tmp_path / checkpoint.BEST)
    (tmp_path / "checkpoint_1.pth").unlink()
    assert checkpoint.read(tmp_path / checkpoint.BEST)["epoch"] == 1


def draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_random_state_survives_a_checkpoint(tmp_path):
    rng.seed_everything(5)
    random.gauss(0, 1)
    checkpoint.write(tmp_path / "x.pth", {**CONTENT, "rng": [rng.capture()]})
    expected = draws()
    rng.restore(checkpoint.read(tmp_path / "x.pth")["rng"][0])
    assert draws() == expected


def test_other_keys_give_other_seeds():
    keys = [(1, 23), (12, 3), (123,), (0, 123), (23, 1)]
    assert len({rng.seed_of(*key) for key in keys}) == len(keys)
    assert rng.seed_of(1, 23) == rng.seed_of(1, 23)


def test_a_seeded_block_leaves_no_trace_and_repeats():
    rng.seed_everything(5)
    expected = draws()
    rng.seed_everything(5)
    with rng.seeded(3):
        first = draws()
    assert draws() == expected
    with rng.seeded(3):
        assert draws() == first


class Tied(nn.Module):
    """A frozen table under two names, a trained layer, and statistics that training changes."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.table.weight
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.frozen_norm = nn.BatchNorm1d(4).requires_grad_(False)


def test_only_what_training_changes_is_saved():
    names = trainable_state(Tied()).keys()
    assert "layer.1.running_mean" in names
    assert all(name.startswith("layer.") for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer.0.weight"), "x.pth doesn't fit Tied; missing: layer.0.weight"),
        (lambda state: state.update(other=torch.zeros(1)), "unknown: other"),
        (lambda state: state.update({"layer.0.bias": torch.zeros(9)}), r"layer.0.bias \(9,\) instead of \(4,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    state = trainable_state(Tied())
    load_trainable(Tied(), state, source="x.pth")
    change(state)
    with pytest.raises(UserError, match=message):
        load_trainable(Tied(), state, source="x.pth")


def test_the_scale_of_fp16_comes_back():
    def state(scale):
        model, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.zeros(1))  # else it has not made its scale yet
        return TrainingState(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler,
            config={"run": {"batch_size_train": 4}, "model": {}, "datasets": {}}, batches_per_epoch=1,
            steps_per_epoch=1, seed=1, has_streams=False,
        )  # fmt: skip

    before, after = state(8.0), state(64.0)
    after.restore(before.as_dict([rng.capture()]), source="x")
    assert after.scaler.get_scale() == 8.0


def test_seeding_for_data_seeds_all_three_generators():
    drawn = []
    for _ in range(2):
        rng.seed_cpu(7)
        drawn.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
    assert drawn[0] == drawn[1]


def test_pickled_code_is_not_run(tmp_path):
    checkpoint.write(tmp_path / "checkpoint_1.pth", {**CONTENT, "config": tmp_path})  # a Path, which is pickled code
    with pytest.raises(checkpoint.BadCheckpoint, match="not a usable checkpoint"):
        checkpoint.read(tmp_path / "checkpoint_1.pth")


@pytest.mark.parametrize("missing", ["model", "optimizer", "epoch"])
def test_a_checkpoint_without_one_of_its_parts_is_none(tmp_path, missing):
    torch.save({key: value for key, value in CONTENT.items() if key != missing}, tmp_path / "x.pth")
    with pytest.raises(checkpoint.BadCheckpoint, match="no training state"):
        checkpoint.read(tmp_path / "x.pth")


def test_a_name_left_by_a_killed_process_is_not_written_through(tmp_path):
    save(tmp_path, "checkpoint_0.pth")
    checkpoint.write(tmp_path / "checkpoint_1.pth", {**CONTENT, "epoch": 2})
    os.link(tmp_path / "checkpoint_0.pth", tmp_path / f".{checkpoint.BEST}.tmp")
    checkpoint.alias(tmp_path / "checkpoint_1.pth", tmp_path / checkpoint.BEST)
    assert checkpoint.read(tmp_path / "checkpoint_0.pth")["epoch"] == CONTENT["epoch"]
    assert checkpoint.read(tmp_path / checkpoint.BEST)["epoch"] == 2


def test_a_tied_weight_is_saved_under_each_of_its_names():
    model = nn.ModuleDict({"table": nn.Embedding(3, 3), "head": nn.Linear(3, 3, bias=False)})
    model["head"].weight = model["table"].weight
    assert trainable_state(model).keys() == {"table.weight", "head.weight"}


def test_names_of_corrupt_samples_are_kept_up_to_a_number_and_all_are_counted():
    corrupt = Corrupt([f"a{number}" for number in range(Corrupt.MOST - 1)], 2000)
    corrupt.update(["a1", "b1", "b2"])
    assert len(corrupt.names) == Corrupt.MOST
    assert corrupt.count == 2002
