"""Shared by the tasks of both stages: named losses, their means over ranks, and batches with their padding marked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavis_xformer import distributed
from lavis_xformer.distributed import is_main
from lavis_xformer.engine.batches import count_samples, to_device
from lavis_xformer.errors import UserError
from lavis_xformer.files import write_json

logger = logging.getLogger(__name__)

Samples = dict[str, Any]
T = TypeVar("T")

NO_CAPTIONS = (
    "{} has no captions ('text_input'), which the losses need (LAVIS's caption datasets have them for training only); "
    "evaluate a split of image-text pairs, or set run.valid_splits and run.test_splits to []"
)


class NamedLossTask(BaseTask):
    """A task whose model returns a dict with ``loss`` and named terms; evaluates their means.

    Attributes:
        scores: per-item scores of the last evaluation, for paired comparisons: ``question_id``, ``image``,
            ``question``, ``kind``, ``group``, ``correct`` (0 to 1) and ``guess`` (the chance level).
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Samples] = []
        self._divided = True

    def check_split(self, name: str, dataset: Any) -> None:
        """Check the first sample of a split before training, so that its evaluation doesn't fail afterwards.

        Raises:
            UserError: the split can't be evaluated.
        """
        if len(dataset) and "text_input" not in dataset[0]:
            raise UserError(NO_CAPTIONS.format(f"the split '{name}'"))

    def train_terms(self, model: nn.Module, samples: Samples) -> Mapping[str, Any]:
        """Return the model's output for a batch; the loop optimises ``loss`` and logs every term."""
        return model(samples)

    def evaluation(self, model: nn.Module, data_loader: DataLoader[Any], cuda_enabled: bool = True) -> dict[str, float]:
        """Return the metrics of a split, equal on all ranks.

        Terms are averaged over batches, weighted by their samples; in a rank's last batch, which repeats samples to be
        full, the repeats enter its mean. Terms that contrast the samples of a batch (ITC, ITM), and means over its
        tokens (ITG, LM), depend on the global batch size (``batch_size_eval`` times the processes): compare them at
        equal sizes only.
        """
        self._divided = hasattr(data_loader.sampler, "num_replicas")
        device = next(model.parameters()).device
        sums = TermSums()
        with torch.no_grad(), contextlib.nullcontext() if self._divided else distributed.alone():
            for samples, fresh in own_batches(data_loader, device):
                sums.add(model(samples), weight=sum(fresh))
                self.observe(model, samples, fresh)
        return {**sums.means(), **self.figures()}

    def observe(self, model: Any, samples: Samples, fresh: Sequence[bool]) -> None:
        """Process an evaluation batch; ``fresh`` (B,) is False for samples that only pad the last batch of a rank."""

    def collect(self, value: T) -> list[T]:
        """Return every rank's value, or only the first if each rank has evaluated the whole split."""
        values = distributed.collect(value)
        return values if self._divided else values[:1]

    def figures(self) -> dict[str, float]:
        """Return the metrics of what ``observe`` collected, over all ranks."""
        return {}

    def goal(self, figures: Mapping[str, float]) -> float:
        """Return what the best checkpoint has most of, from the metrics of a split: here the negative loss."""
        return -figures["loss"]

    def after_evaluation(
        self, val_result: dict[str, float], split_name: str, epoch: int | str, **unused: object
    ) -> dict[str, float]:
        """Add ``agg_metrics``, the goal; after the final evaluation, write ``result/<split>_scores.json``."""
        figures = {"agg_metrics": self.goal(val_result), **val_result}
        if epoch == "best" and is_main():
            path = Path(registry.get_path("result_dir")) / f"{split_name}_scores.json"
            try:
                write_json(path, {"split": split_name, "figures": figures, "answers": self.scores})
            except OSError as error:
                logger.warning("the per-item scores can't be written: %s; continuing", error)
        return figures

    def table(self, figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
        """Return rows (name, value, value to compare it with) of ``figures`` for display."""
        return [(name, f"{value:.4f}", "") for name, value in figures.items() if name.startswith("loss")]


class TermSums:
    """Sample-weighted means of 0-dim terms over batches and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, output: Mapping[str, Any], *, weight: float) -> None:
        """Add a batch's output."""
        self._weight += weight
        for name, value in output.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                previous = self._sums.get(name, torch.zeros((), device=value.device))
                self._sums[name] = previous + value.detach() * weight

    def means(self) -> dict[str, float]:
        """Return the means over all ranks."""
        names = list(self._sums)
        values = [self._sums[name].cpu().double() for name in names]
        summed = distributed.total(torch.stack([*values, torch.tensor(self._weight).double()]))
        return dict(zip(names, (summed[:-1] / summed[-1]).tolist(), strict=True))


def own_batches(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Samples, list[bool]]]:
    """Yield this rank's batches, and for each of their samples whether it is not a repeat.

    A distributed sampler repeats samples so that all ``W`` ranks have equally many: rank ``r``'s ``i``-th
    sample is number ``i * W + r`` of the split, and a repeat if that number is beyond the split's end.

    Raises:
        UserError: the split has no captions, or no samples.
    """
    world = getattr(loader.sampler, "num_replicas", 1)
    own_rank = getattr(loader.sampler, "rank", 0)
    length = len(loader.dataset)  # type: ignore[arg-type]
    if length == 0:
        raise UserError("the split to evaluate has no samples")
    done = 0
    hidden = None if is_main() else True  # None: where stderr is no terminal
    for samples in tqdm(loader, desc="evaluating", leave=False, disable=hidden):
        if "text_input" not in samples:
            raise UserError(NO_CAPTIONS.format("the split to evaluate"))
        size = count_samples(samples)
        fresh = [(done + i) * world + own_rank < length for i in range(size)]
        done += size
        yield to_device(samples, device), fresh
