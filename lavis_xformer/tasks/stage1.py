"""``xformer_stage1``: pre-training, evaluated by its losses, matching and retrieval.

B: samples of a batch, I: images, T: captions, Q: queries, E: width of the contrastive space.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from lavis.common.registry import registry
from torch import Tensor, nn

from lavis_xformer import losses
from lavis_xformer.distributed import rank
from lavis_xformer.engine.batches import image_ids, select
from lavis_xformer.tasks import metrics
from lavis_xformer.tasks.base import NamedLossTask, Samples


@registry.register_task("xformer_stage1")
class Stage1Task(NamedLossTask):
    """Pre-training with ITC, ITM, ITG and reconstruction; evaluated by them and by retrieval.

    Retrieval compares captions with the best of an image's queries over the whole split, by the
    features of ``extract_features`` as in LAVIS's BLIP-2. ``agg_metrics`` is the mean of image-to-text
    and text-to-image R@1.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def before_evaluation(self, model: nn.Module, dataset: Any, **kwargs: object) -> None:
        """Clear the features of an earlier split."""
        super().before_evaluation(model, dataset, **kwargs)
        self._forget()

    def observe(self, model: Any, samples: Samples, fresh: Sequence[bool]) -> None:
        """Keep the features of each image seen for the first time, and of every caption."""
        unnamed = [f"{rank()}/{len(self._owners) + i}" for i in range(len(fresh))]
        ids = image_ids(samples) or unnamed
        captions = samples.get("captions", [[text] for text in samples["text_input"]])  # of each image
        owned = [(name, text) for name, texts in compress(zip(ids, captions, strict=True), fresh) for text in texts]
        said = [text for _, text in owned] or samples["text_input"]  # a rank may have nothing but repeats
        features = model.extract_features({**samples, "text_input": said}, mode="text").text_embeds_proj[:, 0]
        self._device = features.device
        self._texts.append(features[: len(owned)].float().cpu())  # (T, E)
        self._owners += [name for name, _ in owned]
        new = [i for i, name in enumerate(ids) if name not in self._images and ids.index(name) == i]
        if new:
            images = model.extract_features(select(samples, new), mode="image").image_embeds_proj.float().cpu()
            self._images |= {ids[i]: image.clone() for i, image in zip(new, images, strict=True)}  # (Q, E) each

    def figures(self) -> dict[str, float]:
        """Return R@1/5/10 both ways and their chance levels, in percent."""
        parts = self.collect((self._images, self._owners, torch.cat(self._texts)))
        self._forget()
        names = [name for _, own, _ in parts for name in own]  # of each caption's image
        features = {name: image for images, _, _ in reversed(parts) for name, image in images.items()}
        rows = {name: row for row, name in enumerate(dict.fromkeys(names))}
        owners = torch.tensor([rows[name] for name in names])  # (T,)
        images = torch.stack([features[name] for name in rows])  # (I, Q, E)
        texts = torch.cat([part[2] for part in parts]).to(self._device)  # (T, E)
        parted = [losses.similarity(some.to(self._device), texts).cpu() for some in images.split(256)]
        similarity = torch.cat(parted)  # (I, T)
        ranks = metrics.ranks(similarity, owners)
        self.scores = metrics.hits(ranks, owners, [str(name) for name in rows])
        chance = {f"chance_{n}": v for n, v in metrics.chance_recalls(owners).items()}
        return {**metrics.recalls(ranks), **chance}

    def goal(self, figures: Mapping[str, float]) -> float:
        """Return the mean of both R@1, in percent."""
        return (figures["i2t_r1"] + figures["t2i_r1"]) / 2

    def table(self, figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
        """Return losses (``loss_rec`` beside the frozen MAE's), ITM accuracy and R@k beside their baselines."""
        references = {"loss_rec": f"{figures['rec_mae']:.4f}"} if "rec_mae" in figures else {}
        rows = [(name, value, references.get(name, "")) for name, value, _ in super().table(figures)]
        if "itm_accuracy" in figures:  # two mismatched pairs for each matched one: 66.7 % by always rejecting
            accuracy = 100 * figures["itm_accuracy"]
            rows.append(("ITM accuracy %", f"{accuracy:.1f}", "66.7"))
        for way, title in (("i2t", "image to text"), ("t2i", "text to image")):
            for k in metrics.KS:
                key = f"{way}_r{k}"
                rows.append((f"{title} R@{k} %", f"{figures[key]:.1f}", f"{figures[f'chance_{key}']:.1f}"))
        return rows

    def _forget(self) -> None:
        self._images: dict[Hashable, Tensor] = {}
        self._texts: list[Tensor] = []
        self._owners: list[Hashable] = []
