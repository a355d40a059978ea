"""``xformer_captioning`` and ``xformer_retrieval``: LAVIS's tasks for captions and retrieval, told how they asked.

Scores are LAVIS's (pycocoevalcap for captions, which needs Java), and so are the files it writes; beside them stands
``result/<split>_<dataset>.json`` with the protocol and the sha256 of the annotation file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.retrieval import RetrievalTask

from lavis_xformer.distributed import is_main
from lavis_xformer.errors import UserError
from lavis_xformer.files import read_json
from lavis_xformer.tasks import metrics
from lavis_xformer.tasks.protocols import (
    CAPTION_PROTOCOLS,
    RETRIEVAL_PROTOCOLS,
    Protocol,
    Row,
    WithProtocol,
    named,
    write_result,
)


@registry.register_task("xformer_captioning")
class XFormerCaptionTask(WithProtocol, CaptionTask):
    """COCO and NoCaps captions."""

    CONFIG_KEYS = WithProtocol.CONFIG_KEYS | {"report_metric"}
    PROTOCOLS: ClassVar[Mapping[str, Protocol]] = CAPTION_PROTOCOLS

    def build_model(self, cfg: Any) -> Any:
        """Build the model as LAVIS does.

        Raises:
            UserError: it can't be asked by a protocol.
        """
        arch = cfg.model_cfg.arch
        if "length_penalty" not in signature(registry.get_model_class(arch).generate).parameters:
            raise UserError(
                f"run.task: xformer_captioning asks with a prompt and a length penalty, and model.arch {arch} takes "
                "none, as no model of stage 1 does; it captions under LAVIS's own run.task: captioning"
            )
        return super().build_model(cfg)

    def valid_step(self, model: Any, samples: Row) -> list[Row]:
        """Caption a batch by the protocol, its prompt and length penalty included."""
        captions = model.generate(
            {**samples, "prompt": self.protocol.prompt},
            num_beams=self.protocol.num_beams,
            max_length=self.protocol.max_len,
            min_length=self.protocol.min_len,
            length_penalty=self.protocol.length_penalty,
        )
        ids = samples["image_id"]
        return [{"caption": caption, "image_id": int(number)} for caption, number in zip(captions, ids, strict=True)]

    def after_evaluation(
        self, val_result: Sequence[Row], split_name: str, epoch: int | str, **unused: object
    ) -> dict[str, float] | None:
        """Score as LAVIS, and keep every caption."""
        figures: dict[str, float] | None = super().after_evaluation(val_result, split_name, epoch)
        if is_main():
            saved = Path(registry.get_path("result_dir")) / f"{split_name}_epoch{epoch}.json"  # of all ranks, by LAVIS
            said = read_json(saved)
            self.write(split_name, figures or {}, scorer="pycocoevalcap" if self.report_metric else "none", said=said)
        return figures


@registry.register_task("xformer_retrieval")
class XFormerRetrievalTask(RetrievalTask):
    """COCO and Flickr retrieval, by stage 1."""

    CONFIG_KEYS: ClassVar[frozenset[str]] = frozenset({"protocol", "k_test"})

    @classmethod
    def setup_task(cls, cfg: Any) -> XFormerRetrievalTask:
        """Read what LAVIS reads, and ``run.protocol``; ``run.k_test`` may change how many are ranked anew.

        Raises:
            UserError: there is no such protocol.
        """
        protocol = named(cfg.run_cfg, RETRIEVAL_PROTOCOLS)
        cfg.run_cfg.use_dist_eval_sampler = False  # LAVIS itself shares out the ranking of a whole split
        cfg.run_cfg.k_test = cfg.run_cfg.get("k_test", protocol["k_test"])  # LAVIS has no default
        task: XFormerRetrievalTask = super().setup_task(cfg)
        task.config = cfg.to_dict()
        asked = {"k_test": cfg.run_cfg.k_test, "image_size": task.config.get("model", {}).get("image_size")}
        task.protocol = protocol | asked
        return task

    def evaluation(self, model: Any, data_loader: Any, **unused: object) -> Row | None:
        """Rank as LAVIS; beside its recalls (``txt_r1``: from image to text) stands what chance gives."""
        figures: Row | None = super().evaluation(model, data_loader)
        if figures is None:
            return None
        image_of = data_loader.dataset.txt2img
        chance = metrics.chance_recalls(torch.tensor([image_of[text] for text in range(len(image_of))]))
        names = {"i2t": "txt", "t2i": "img"}
        return {**figures, **{f"chance_{names[key[:3]]}{key[3:]}": value for key, value in chance.items()}}

    def after_evaluation(self, val_result: Row | None, split_name: str, **unused: object) -> Row | None:
        """Write recalls at 1, 5 and 10, in percent, with how they were ranked."""
        if is_main() and val_result is not None:
            write_result(self.config, split_name, self.protocol, val_result, scorer="lavis")
        return val_result
