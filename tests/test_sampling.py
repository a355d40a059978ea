"""Orders that can be replayed: every sample once an epoch, or datasets in given shares."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import toy_training
from torch.utils.data import ConcatDataset

from lavis_xformer.engine import sampling
from lavis_xformer.engine.sampling import EpochBatchSampler, Mixture
from lavis_xformer.errors import UserError


def epochs(count, *, world_size=1, mixture=None, length=30, batch_size=6, skip=0):
    """Joined batches of each epoch, as lists of keys."""
    found = []
    for epoch in range(count):
        parts = []
        for rank in range(world_size):
            sampler = EpochBatchSampler(
                length=length, batch_size=batch_size // world_size, seed=3, rank=rank, world_size=world_size,
                mixture=mixture,
            )  # fmt: skip
            sampler.start(epoch=epoch, skip_batches=skip)
            parts.append(list(sampler))
        found.append([list(chain(*batches)) for batches in zip(*parts, strict=True)])
    return found


def flat(batches):
    return list(chain(*batches))


def test_every_sample_comes_once_an_epoch_in_another_order():
    first, second = epochs(2)
    assert sorted(flat(first)) == [(0, i) for i in range(30)]
    assert sorted(flat(second)) == [(1, i) for i in range(30)]
    assert [i for _, i in flat(first)] != [i for _, i in flat(second)]


@pytest.mark.parametrize("mixture", [None, Mixture(lengths=[5, 25], ratios=[1, 2], samples=30)])
def test_processes_and_restarts_share_one_order(mixture):
    whole = epochs(3, mixture=mixture, length=32)
    assert epochs(3, world_size=2, mixture=mixture, length=32) == whole
    assert epochs(3, skip=2, mixture=mixture, length=32) == [batches[2:] for batches in whole]
    assert [len(batches) for batches in whole] == [5, 5, 5], "what is left over is left out"


def test_shares_are_exact_and_no_sample_comes_again_before_the_others():
    mixture = Mixture(lengths=[5, 25], ratios=[1, 2], samples=30)
    assert mixture.counts() == [10, 20]
    seen = []
    for batches in epochs(5, mixture=mixture):
        keys = flat(batches)
        assert sum(index < 5 for _, index in keys) == 10
        assert 10 < sum(place for place, (_, index) in enumerate(keys) if index < 5) / 10 < 20, "they come mixed"
        seen += keys
    times = Counter(index for _, index in seen)
    assert {times[i] for i in range(5)} == {10}
    assert {times[i] for i in range(5, 30)} == {4}
    assert len(set(seen)) == len(seen), "each visit of a sample is another one, with its own augmentation"


@pytest.mark.parametrize("ratios", [[0.3, 0.3, 0.4], [1, 1e-9, 1], [7, 5, 3]])
def test_shares_add_up_to_an_epoch(ratios):
    counts = Mixture(lengths=[11, 13, 17], ratios=ratios, samples=41).counts()
    assert sum(counts) == 41
    assert all(abs(n - 41 * r / sum(ratios)) < 1 for n, r in zip(counts, ratios, strict=True))
    assert len(Mixture(lengths=[11, 13, 17], ratios=ratios, samples=41).keys(seed=0, epoch=4)) == 41


def test_ratios_have_to_fit_the_datasets():
    joined = ConcatDataset([toy_training.ToyPairs(4), toy_training.ToyPairs(6)])
    assert Mixture.of(joined, [1, 3], samples=10).lengths == [4, 6]
    for wrong in ([1], [1, 0], [1, "2"]):
        with pytest.raises(UserError, match=r"one positive number for each of the 2 .* 4 samples, 6 samples"):
            Mixture.of(joined, wrong, samples=10)


def test_the_runs_seed_decides_the_order_and_every_augmentation(tmp_path):
    first, again, other = (
        toy_training.make_runner(tmp_path, job_id=name, seed=seed).train_loader
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert list(first.batch_sampler) == list(again.batch_sampler) != list(other.batch_sampler)
    pictures = [loader.dataset[0, 3]["image"] for loader in (first, again, other)]
    assert pictures[0].equal(pictures[1])
    assert not pictures[0].equal(pictures[2])


def test_each_process_does_the_batches_of_an_epoch_of_a_given_length(monkeypatch):
    monkeypatch.setattr(sampling, "world_size", lambda: 2)
    for batches in (3, 9):
        loader = sampling.train_loader(toy_training.ToyPairs(24), batch_size=4, seed=1, batches=batches, num_workers=0)
        assert len(loader) == batches


def test_a_run_with_ratios_resumes_to_the_bit(tmp_path):
    def make(**run):
        datasets = {
            "a": {"train": toy_training.ToyPairs(8), "val": toy_training.ToyPairs(8, augmented=False)},
            "b": {"train": toy_training.ToyPairs(40)},
        }
        return toy_training.make_runner(tmp_path, datasets=datasets, train_dataset_ratios=[1, 1], **run)

    whole = make(job_id="whole", save_every_steps=4, keep_last=0)
    whole.train()
    again = make(job_id="again", resume_ckpt_path=str(whole.output_dir / "checkpoint_1_step8.pth"))
    again.train()
    left, right = (run.state.model.state_dict() for run in (whole, again))
    assert all(left[name].equal(right[name]) for name in left)


def test_captions_and_questions_joined_into_one_have_shares_of_their_own():
    joined = ConcatDataset([ConcatDataset([toy_training.ToyPairs(16), toy_training.ToyPairs(8)])])
    assert Mixture.of(joined, [1, 3], samples=24).counts() == [6, 18]
    assert Mixture.of(joined, None, samples=24).counts() == [24]


def test_what_fills_no_batch_is_not_drawn_from_the_shares():
    joined = ConcatDataset([toy_training.ToyPairs(5), toy_training.ToyPairs(5)])
    loader = sampling.train_loader(joined, batch_size=4, seed=1, ratios=[1, 1], num_workers=0)
    drawn: Counter[int] = Counter()
    for epoch in range(5):
        loader.start(epoch=epoch)
        drawn.update(index for batch in loader.batch_sampler for _, index in batch)
    assert drawn == dict.fromkeys(range(10), 4), "each as often as the others, though batches of 4 leave 2 of 10 out"


def test_a_share_too_small_for_a_sample_is_refused():
    joined = ConcatDataset([toy_training.ToyPairs(320), toy_training.ToyPairs(24)])
    with pytest.raises(UserError, match=r"of the 12 samples of an epoch, the datasets would get 12, 0; raise"):
        Mixture.of(joined, [1, 0.03], samples=12)


def test_a_split_shared_by_processes_keeps_its_order(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *unused: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda *unused: 1)
    loader = sampling.eval_loader(toy_training.ToyPairs(6), share=True, batch_size=1, num_workers=0)
    assert list(loader.sampler) == [1, 3, 5]


def test_datasets_take_turns_differently_in_every_epoch():
    mixture = Mixture(lengths=[10, 10], ratios=[1, 1], samples=20)
    first, second = ([index < 10 for _, index in mixture.keys(seed=3, epoch=epoch).tolist()] for epoch in (0, 1))
    assert first != second


def test_datasets_of_one_length_have_orders_of_their_own():
    drawn = {i for _, i in Mixture(lengths=[10, 10], ratios=[1, 1], samples=10).keys(seed=3, epoch=0).tolist()}
    assert {i for i in drawn if i < 10} != {i - 10 for i in drawn if i >= 10}
