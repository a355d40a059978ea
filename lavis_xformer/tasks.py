"""Tasks: how a model is trained on a batch and judged on a split.

B: samples of a batch, I: images, T: captions, N: queries, E: width of the contrastive space.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lavis_xformer import launch, metrics
from lavis_xformer.distributed import is_main, rank
from lavis_xformer.engine.log import bar
from lavis_xformer.engine.loop import count_samples, image_ids, to_device
from lavis_xformer.errors import UserError

logger = logging.getLogger(__name__)

Samples = dict[str, Any]


NO_CAPTIONS = (
    "{} gives no captions ('text_input'), which the losses need (LAVIS's caption datasets have them in training only); "
    "evaluate a split of image-text pairs, or set run.valid_splits and run.test_splits to []"
)


class NamedLossTask(BaseTask):
    """A task whose model returns a dict with ``loss`` and named terms; evaluates their means."""

    def check_split(self, name: str, dataset: Any) -> None:
        """Look at the first sample of a split before the training that would end with its evaluation.

        Raises:
            UserError: it can't be evaluated.
        """
        if len(dataset) and "text_input" not in dataset[0]:
            raise UserError(NO_CAPTIONS.format(f"the split '{name}'"))

    def train_terms(self, model: nn.Module, samples: Samples) -> Mapping[str, Any]:
        """Return the model's output for a batch; the loop optimises ``loss`` and logs every term."""
        return model(samples)

    def evaluation(self, model: nn.Module, data_loader: DataLoader[Any], cuda_enabled: bool = True) -> dict[str, float]:
        """Return figures of a split, equal on all ranks.

        Terms are means weighted by samples. Those that contrast the samples of a batch (ITC, ITM)
        depend on ``batch_size_eval`` times the number of processes: compare them at one value only.
        """
        device = next(model.parameters()).device
        sums = TermSums()
        with torch.no_grad():
            for samples, fresh in own_batches(data_loader, device):
                sums.add(model(samples), weight=sum(fresh))
                self.observe(model, samples, fresh)
        return {**sums.means(), **self.figures()}

    def observe(self, model: Any, samples: Samples, fresh: Sequence[bool]) -> None:
        """Look at a batch of evaluation; ``fresh`` (B,) is False for samples that only pad the last batch of a rank."""

    def figures(self) -> dict[str, float]:
        """Return what ``observe`` found, over all ranks."""
        return {}

    def after_evaluation(
        self, val_result: dict[str, float], split_name: str, epoch: int | str, **unused: object
    ) -> dict[str, float]:
        """Add ``agg_metrics``, by which the best checkpoint is chosen: here the negative loss."""
        return {"agg_metrics": -val_result["loss"], **val_result}

    def table(self, figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
        """Return rows (name, value, what to compare it with) of ``figures`` for people."""
        return [(name, f"{value:.4f}", "") for name, value in figures.items() if name.startswith("loss")]


@registry.register_task("xformer_stage1")
class Stage1Task(NamedLossTask):
    """Pre-training with ITC, ITM, ITG and reconstruction; judged by them and by retrieval.

    Retrieval compares captions with the best of an image's queries, from ``extract_features`` as
    LAVIS's BLIP-2 has it, over the whole split. ``agg_metrics`` is the mean of image-to-text and
    text-to-image R@1.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def before_evaluation(self, model: nn.Module, dataset: Any, **kwargs: object) -> None:
        """Forget the features of an earlier split."""
        super().before_evaluation(model, dataset, **kwargs)
        self._forget()

    def evaluation(self, model: nn.Module, data_loader: DataLoader[Any], cuda_enabled: bool = True) -> dict[str, float]:
        """Return figures of a split, which ranks may share or, without a distributed sampler, each have as a whole."""
        self._shared = hasattr(data_loader.sampler, "num_replicas")
        return super().evaluation(model, data_loader, cuda_enabled)

    def observe(self, model: Any, samples: Samples, fresh: Sequence[bool]) -> None:
        """Keep the features of each image seen for the first time, and of every caption."""
        unnamed = [f"{rank()}/{len(self._owners) + i}" for i in range(len(fresh))]
        ids = image_ids(samples) or unnamed
        texts = model.extract_features(samples, mode="text").text_embeds_proj[:, 0]  # (B, E)
        self._texts.append(texts[torch.tensor(fresh, device=texts.device)].float().cpu())
        self._owners += compress(ids, fresh)
        new = [i for i, name in enumerate(ids) if name not in self._seen and ids.index(name) == i]
        if new:
            images = model.extract_features(take(samples, new), mode="image").image_embeds_proj
            self._images.append(images.float().cpu())  # (new, N, E)
            self._seen |= dict.fromkeys(ids[i] for i in new)

    def figures(self) -> dict[str, float]:
        """Return R@1/5/10 both ways in percent, and what chance gives."""
        parts = launch.collect((list(self._seen), torch.cat(self._images), self._owners, torch.cat(self._texts)))
        parts = parts if self._shared else parts[:1]
        self._forget()
        names = [name for part in parts for name in part[0]]
        features = torch.cat([part[1] for part in parts])  # (>= I, N, E)
        firsts: dict[Hashable, int] = {}
        for place, name in enumerate(names):
            firsts.setdefault(name, place)
        row = {name: i for i, name in enumerate(firsts)}
        owners = torch.tensor([row[name] for part in parts for name in part[2]])  # (T,)
        texts = torch.cat([part[3] for part in parts])  # (T, E)
        similarity = metrics.best_query_similarity(features[list(firsts.values())], texts)  # (I, T)
        chance = {f"chance_{n}": v for n, v in metrics.chance_recalls(owners).items()}
        return {**metrics.recalls(similarity, owners), **chance}

    def after_evaluation(
        self, val_result: dict[str, float], split_name: str, epoch: int | str, **unused: object
    ) -> dict[str, float]:
        """Add ``agg_metrics``: the mean of both R@1, in percent."""
        agg = (val_result["i2t_r1"] + val_result["t2i_r1"]) / 2
        return {"agg_metrics": agg, **val_result}

    def table(self, figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
        """Return losses (``loss_rec`` beside the frozen MAE's own), ITM accuracy and R@k beside what chance gives."""
        references = {"loss_rec": f"{figures['rec_mae']:.4f}"} if "rec_mae" in figures else {}
        rows = [(name, value, references.get(name, "")) for name, value, _ in super().table(figures)]
        if "itm_accuracy" in figures:  # two mismatched pairs for each matched one
            accuracy = 100 * figures["itm_accuracy"]
            rows.append(("ITM accuracy %", f"{accuracy:.1f}", "66.7"))
        for way, title in (("i2t", "image to text"), ("t2i", "text to image")):
            for k in metrics.KS:
                key = f"{way}_r{k}"
                rows.append((f"{title} R@{k} %", f"{figures[key]:.1f}", f"{figures[f'chance_{key}']:.1f}"))
        return rows

    def _forget(self) -> None:
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []
        self._owners: list[Hashable] = []
        self._seen: dict[Hashable, None] = {}


class TermSums:
    """Means of 0-dim terms, weighted by samples, over batches and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, output: Mapping[str, Any], *, weight: float) -> None:
        """Take in a batch's output."""
        self._weight += weight
        for name, value in output.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                previous = self._sums.get(name, torch.zeros((), device=value.device))
                self._sums[name] = previous + value.detach() * weight

    def means(self) -> dict[str, float]:
        """Return the means over all ranks."""
        names = list(self._sums)
        values = [self._sums[name].cpu().double() for name in names]
        summed = launch.total(torch.stack([*values, torch.tensor(self._weight).double()]))
        return dict(zip(names, (summed[:-1] / summed[-1]).tolist(), strict=True))


def own_batches(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Samples, list[bool]]]:
    """Yield this rank's batches and which of their samples are no repetition.

    A distributed sampler repeats samples so that all ranks have equally many: rank ``r``'s ``i``-th
    sample is number ``i * W + r`` of the split, and a repetition where the split has fewer.

    Raises:
        UserError: the split has no captions, or no samples.
    """
    world = getattr(loader.sampler, "num_replicas", 1)
    own_rank = getattr(loader.sampler, "rank", 0)
    length = len(loader.dataset)  # type: ignore[arg-type]
    if length == 0:
        raise UserError("the split to evaluate has no samples")
    done = 0
    for samples in bar(loader, "evaluating", shown=is_main()):
        if "text_input" not in samples:
            raise UserError(NO_CAPTIONS.format("the split to evaluate"))
        size = count_samples(samples)
        fresh = [(done + i) * world + own_rank < length for i in range(size)]
        done += size
        yield to_device(samples, device), fresh


def take(samples: Samples, rows: Sequence[int]) -> Samples:
    """Return some rows of a batch: of tensors and lists as long as the batch; the rest as it is."""
    size = count_samples(samples)

    def _pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == size:
            return value[list(rows)]
        return [value[i] for i in rows] if isinstance(value, list) and len(value) == size else value

    return {name: _pick(value) for name, value in samples.items()}
