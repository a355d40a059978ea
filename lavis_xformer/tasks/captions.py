"""``xformer_captioning`` and ``xformer_retrieval``: LAVIS's captioning and retrieval tasks, with a named protocol.

Scores are LAVIS's (pycocoevalcap for captions, which needs Java), and so are its result files;
``result/<split>_<dataset>.json`` adds the protocol and the sha256 of the annotation file. Captions are written before
they are scored, so that they are kept even if scoring fails.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.retrieval import RetrievalTask

from lavis_xformer.distributed import is_main
from lavis_xformer.engine.batches import image_ids
from lavis_xformer.errors import UserError, first_line, whole
from lavis_xformer.files import read_json, sha256
from lavis_xformer.tasks import metrics
from lavis_xformer.tasks.caption_scores import Truths, check_scoring, fetch_truths, read_truths, scored
from lavis_xformer.tasks.protocols import (
    CAPTION_PROTOCOLS,
    RETRIEVAL_PROTOCOLS,
    Protocol,
    Row,
    WithProtocol,
    chosen,
    write_result,
)

logger = logging.getLogger(__name__)


@registry.register_task("xformer_captioning")
class XFormerCaptionTask(WithProtocol, CaptionTask):
    """COCO and NoCaps captions.

    Scored against LAVIS's download for COCO, the file's own captions for ``image_text_json``, or, for any dataset whose
    images have ids, ``run.caption_truths``, a file in COCO's format.
    """

    CONFIG_KEYS = WithProtocol.CONFIG_KEYS | {"report_metric", "caption_truths"}
    PROTOCOLS: ClassVar[Mapping[str, Protocol]] = CAPTION_PROTOCOLS
    MODEL_PROMPT = "prompt"
    report_metric: bool
    truths: Path | None
    own_truths: Truths | None = None

    @classmethod
    def setup_task(cls, cfg: Any) -> XFormerCaptionTask:
        """Read LAVIS's settings, the protocol, and ``run.caption_truths``, which turns scoring on.

        Raises:
            UserError: there is no such protocol, or the reference captions or Java needed for scoring are missing.
        """
        task: XFormerCaptionTask = super().setup_task(cfg)
        run, file = cfg.run_cfg, cfg.run_cfg.get("caption_truths")
        task.truths = Path(file) if file else None
        task.report_metric = bool(task.report_metric or file)
        if task.report_metric and (run.get("valid_splits") or run.get("test_splits")):
            check_scoring(file, list(task.config["datasets"]))
        return task

    def build_model(self, cfg: Any) -> Any:
        """Build the model as LAVIS does.

        Raises:
            UserError: its ``generate`` takes no length penalty, which the protocol sets.
        """
        arch = cfg.model_cfg.arch
        if "length_penalty" not in signature(registry.get_model_class(arch).generate).parameters:
            raise UserError(
                f"run.task: xformer_captioning needs a prompt and a length penalty, which model.arch {arch} does not "
                "take (no stage-1 model does); use LAVIS's own run.task: captioning"
            )
        return super().build_model(cfg)

    def check_split(self, name: str, dataset: Any) -> None:
        """Check, before anything is trained or captioned, that an image of a split has reference captions.

        Raises:
            UserError: ``run.caption_truths`` has none for it, or the images have no ids by which to find them; COCO's
                own can't be downloaded.
        """
        if self.truths is None and self.report_metric and not hasattr(dataset, "references") and is_main():
            fetch_truths(name)
        if not (self.truths and len(dataset)):
            return
        if not getattr(dataset, "has_ids", True):
            raise UserError(
                f"run.caption_truths: the images of '{name}' have no ids of their own: set id_key to a key that holds "
                "a whole number, or leave caption_truths out: then the file's own captions are the references"
            )
        image = int(dataset[0]["image_id"])
        if image not in read_truths(self.truths).captions:
            raise UserError(f"run.caption_truths: {self.truths} has no captions of image {image} of '{name}'")

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Keep the captions of a split of own files."""
        super().before_evaluation(model, dataset, **kwargs)
        self.own_truths = Truths(dataset.references(), {}) if hasattr(dataset, "references") else None

    def valid_step(self, model: Any, samples: Row) -> list[Row]:
        """Caption a batch by the protocol, including its prompt and length penalty."""
        captions = model.generate(
            {**samples, "prompt": self.protocol.prompt},
            num_beams=self.protocol.num_beams,
            max_length=self.protocol.max_len,
            min_length=self.protocol.min_len,
            length_penalty=self.protocol.length_penalty,
        )
        said = zip(captions, samples["image_id"], image_ids(samples), strict=True)
        return [{"caption": text, "image_id": int(number), "image": str(image)} for text, number, image in said]

    def after_evaluation(
        self, val_result: Sequence[Row], split_name: str, epoch: int | str, **unused: object
    ) -> dict[str, float] | None:
        """Save every caption, then score as LAVIS does; None if they are not to be scored, and on other ranks."""
        result_dir = registry.get_path("result_dir")
        saved = Path(self.save_result(val_result, result_dir, f"{split_name}_epoch{epoch}", "image_id"))  # of all ranks
        if not is_main():
            return None
        self.write(split_name, {}, scorer="none", said=read_json(saved))
        return self._score(split_name, saved) if self.report_metric else None

    def _score(self, split: str, saved: Path) -> dict[str, float]:
        """Score, and write the captions again, with the metrics."""
        try:
            truths = self.truths or self.own_truths or fetch_truths(split)
            figures, rows = scored(truths, saved)
        except (OSError, UserError) as error:
            raise UserError(
                f"the captions are not scored: {first_line(error)}. They are saved in {saved}; score them with "
                '`python -c "from lavis_xformer.tasks.captions import scored; '
                f"print(scored('TRUTHS.json', '{saved}')[0])\"`"
            ) from error
        with open(Path(registry.get_path("output_dir")) / "evaluate.txt", "a", encoding="utf-8") as file:
            file.write(json.dumps({split: figures}) + "\n")  # as LAVIS does
        figures["agg_metrics"] = figures["CIDEr"] + figures["Bleu_4"]
        used = {str(truths): sha256(truths)} if isinstance(truths, Path) else {}  # else those of the question file
        self.write(split, figures, scorer="pycocoevalcap", said=rows, truth_sha256=used)
        return figures


@registry.register_task("xformer_retrieval")
class XFormerRetrievalTask(RetrievalTask):
    """COCO and Flickr retrieval, with a stage-1 model."""

    CONFIG_KEYS: ClassVar[frozenset[str]] = frozenset({"protocol", "k_test"})

    @classmethod
    def setup_task(cls, cfg: Any) -> XFormerRetrievalTask:
        """Read LAVIS's settings and ``run.protocol``; ``run.k_test`` overrides how many candidates are re-ranked.

        Raises:
            UserError: there is no such protocol.
        """
        protocol = chosen(cfg.run_cfg, RETRIEVAL_PROTOCOLS)
        cfg.run_cfg.use_dist_eval_sampler = False  # LAVIS itself divides the ranking of a split among ranks
        cfg.run_cfg.k_test = cfg.run_cfg.get("k_test", protocol["k_test"])  # LAVIS has no default
        task: XFormerRetrievalTask = super().setup_task(cfg)
        task.config = cfg.to_dict()
        asked = {"k_test": cfg.run_cfg.k_test, "image_size": task.config.get("model", {}).get("image_size")}
        task.protocol = protocol | asked
        return task

    def check_split(self, name: str, dataset: Any) -> None:
        """Check, before training, that a split has enough candidates to re-rank.

        Raises:
            UserError: ``run.k_test`` is larger than the number of images or texts, or there are no captions to rank.
        """
        if not hasattr(dataset, "txt2img"):
            raise UserError(f"run.task: xformer_retrieval ranks images and captions, but '{name}' is no set of both")
        for number, row in enumerate(getattr(dataset, "annotation", []), start=1):
            given = row.get("caption", [""])
            if not isinstance(given, list) or not given:  # LAVIS's would rank a text letter by letter
                raise UserError(
                    f"'{name}': row {number}: its captions are {given!r}; to be ranked, it needs a list of them"
                )
        smaller = min(len(dataset.text), len(dataset.image))
        if whole("run.k_test", self.protocol["k_test"], least=1) > smaller:
            raise UserError(f"run.k_test is {self.protocol['k_test']}, but '{name}' has only {smaller} candidates")

    def evaluation(self, model: Any, data_loader: Any, **unused: object) -> Row | None:
        """Rank as LAVIS does, and add the chance level of its recalls (``txt_r1``: from image to text)."""
        figures: Row | None = super().evaluation(model, data_loader)
        if figures is None:
            return None
        image_of = data_loader.dataset.txt2img
        chance = metrics.chance_recalls(torch.tensor([image_of[text] for text in range(len(image_of))]))
        names = {"i2t": "txt", "t2i": "img"}
        return {**figures, **{f"chance_{names[key[:3]]}{key[3:]}": value for key, value in chance.items()}}

    def _report_metrics(self, scores_i2t: Any, scores_t2i: Any, txt2img: dict[int, int], img2txt: Any) -> Row:
        """Rank as LAVIS does; keep whether the top candidate of each image and each caption is correct."""
        owners = torch.tensor([txt2img[text] for text in range(len(txt2img))])  # (T,)
        captions, images = (torch.tensor([int(row.argsort()[-1]) for row in of]) for of in (scores_i2t, scores_t2i))
        wrong = {"i2t": owners[captions] != torch.arange(len(captions)), "t2i": images != owners}
        self.scores = metrics.hits(wrong, owners, [str(image) for image in range(len(captions))])
        return super()._report_metrics(scores_i2t, scores_t2i, txt2img, img2txt)

    def after_evaluation(self, val_result: Row | None, split_name: str, **unused: object) -> Row | None:
        """Write recalls at 1, 5 and 10, in percent, with the protocol and the per-item scores."""
        if is_main() and val_result is not None:
            write_result(self.config, split_name, self.protocol, val_result, scorer="lavis", answers=self.scores)
        return val_result
