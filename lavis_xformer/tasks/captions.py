"""``xformer_captioning`` and ``xformer_retrieval``: LAVIS's tasks for captions and retrieval, told how they asked.

Scores are LAVIS's (pycocoevalcap for captions, which needs Java), and so are the files it writes; beside them stands
``result/<split>_<dataset>.json`` with the protocol and the sha256 of the annotation file. Captions are written before
they are scored, so that they are kept whatever scoring says.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from shutil import which
from subprocess import CalledProcessError
from typing import Any, ClassVar, NamedTuple

import torch
from lavis.common.registry import registry
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.retrieval import RetrievalTask
from pycocoevalcap.eval import Bleu, Cider, Meteor, PTBTokenizer, Rouge, Spice
from torchvision.datasets.utils import download_url

from lavis_xformer.config.files import check_file
from lavis_xformer.distributed import is_main
from lavis_xformer.errors import UserError, first_line
from lavis_xformer.files import read_json, sha256
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
from lavis_xformer.tasks.stage1 import hits

logger = logging.getLogger(__name__)

#: where LAVIS has the captions of COCO's Karpathy splits, val and test
TRUTHS_URL = "https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_{}_gt.json"


@registry.register_task("xformer_captioning")
class XFormerCaptionTask(WithProtocol, CaptionTask):
    """COCO and NoCaps captions.

    Scored against what LAVIS downloads for COCO, or ``run.caption_truths``, a file in COCO's format, for any dataset.
    """

    CONFIG_KEYS = WithProtocol.CONFIG_KEYS | {"report_metric", "caption_truths"}
    PROTOCOLS: ClassVar[Mapping[str, Protocol]] = CAPTION_PROTOCOLS
    report_metric: bool
    truths: Path | None

    @classmethod
    def setup_task(cls, cfg: Any) -> XFormerCaptionTask:
        """Read what LAVIS reads, the protocol, and ``run.caption_truths``, which asks for scores by itself.

        Raises:
            UserError: there is no such protocol, or scoring will lack the truths or Java.
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
        """Keep every caption, then score as LAVIS."""
        result_dir = registry.get_path("result_dir")
        saved = Path(self.save_result(val_result, result_dir, f"{split_name}_epoch{epoch}", "image_id"))  # of all ranks
        if not is_main():
            return None
        self.write(split_name, {}, scorer="none", said=read_json(saved))
        return self._score(split_name, saved) if self.report_metric else {"agg_metrics": 0.0}

    def _score(self, split: str, saved: Path) -> dict[str, float]:
        """Score, and write the captions again, with the figures."""
        try:
            truths = self.truths or fetch_truths(split)
            figures, rows = scored(truths, saved)
        except (OSError, UserError) as error:
            raise UserError(
                f"the captions are not scored: {first_line(error)}. They lie in {saved}; later, "
                '`python -c "from lavis_xformer.tasks.captions import scored; '
                f"print(scored('TRUTHS.json', '{saved}')[0])\"` scores them"
            ) from error
        with open(Path(registry.get_path("output_dir")) / "evaluate.txt", "a", encoding="utf-8") as file:
            file.write(json.dumps({split: figures}) + "\n")  # as LAVIS
        figures["agg_metrics"] = figures["CIDEr"] + figures["Bleu_4"]
        self.write(split, figures, scorer="pycocoevalcap", said=rows, truth_sha256={str(truths): sha256(truths)})
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

    def _report_metrics(self, scores_i2t: Any, scores_t2i: Any, txt2img: dict[int, int], img2txt: Any) -> Row:
        """Rank as LAVIS; keep whether each image and each caption found a right one first."""
        owners = torch.tensor([txt2img[text] for text in range(len(txt2img))])  # (T,)
        captions, images = (torch.tensor([int(row.argsort()[-1]) for row in of]) for of in (scores_i2t, scores_t2i))
        wrong = {"i2t": owners[captions] != torch.arange(len(captions)), "t2i": images != owners}
        self.scores = hits(wrong, owners, [str(image) for image in range(len(captions))])
        return super()._report_metrics(scores_i2t, scores_t2i, txt2img, img2txt)

    def after_evaluation(self, val_result: Row | None, split_name: str, **unused: object) -> Row | None:
        """Write recalls at 1, 5 and 10, in percent, with how they were ranked and what came first."""
        if is_main() and val_result is not None:
            write_result(self.config, split_name, self.protocol, val_result, scorer="lavis", answers=self.scores)
        return val_result


class Truths(NamedTuple):
    """What people said of images, and the domain of those that have one, both by the image's id."""

    captions: dict[int, list[str]]
    domains: dict[int, str]


def check_scoring(truths: str | None, datasets: Sequence[str]) -> None:
    """Check before anything is captioned what scoring needs and no network gives.

    Raises:
        UserError: there are no truths, they are not in COCO's format, or there is no Java.
    """
    if not truths and "coco_caption" not in datasets:
        raise UserError(
            f"run.report_metric: LAVIS has truths of coco_caption alone, none of {', '.join(datasets)}; "
            "set run.caption_truths to a file in COCO's format, or run.report_metric to False"
        )
    if truths:
        check_file("run.caption_truths", truths)
        read_truths(Path(truths))
    if which("java") is None:
        raise UserError(
            "run.report_metric: pycocoevalcap scores captions by Java, and there is no `java` on the PATH; install a "
            "Java runtime (8 or newer), or set run.report_metric to False, which keeps the captions unscored"
        )


def fetch_truths(split: str) -> Path:
    """Return the file of COCO's captions of a Karpathy split, in LAVIS's cache, where it is fetched to if need be.

    Raises:
        OSError: it can't be fetched.
    """
    url, folder = TRUTHS_URL.format(split), Path(registry.get_path("cache_root")) / "coco_gt"
    try:
        download_url(url, str(folder))
    except OSError as error:
        raise OSError(f"{url} can't be had ({first_line(error)}), nor does run.caption_truths name a copy") from error
    return folder / Path(url).name


def read_truths(file: Path) -> Truths:
    """Read ``{"images": [{"id"}], "annotations": [{"image_id", "caption"}]}``; NoCaps' images have a ``domain`` too.

    Raises:
        UserError: the file is not in this format.
    """
    captions: dict[int, list[str]] = defaultdict(list)
    try:
        content = read_json(file)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        domains = {image["id"]: image["domain"] for image in content["images"] if "domain" in image}
    except (KeyError, TypeError, ValueError) as error:
        wanted = '{"images": [{"id"}], "annotations": [{"image_id", "caption"}]}'
        raise UserError(f"truths of captions: {file} is not in COCO's format, {wanted}: {error!r}") from error
    return Truths(dict(captions), domains)


def scored(truths: str | Path, saved: str | Path) -> tuple[dict[str, float], list[Row]]:
    """Score captions by pycocoevalcap, as LAVIS does.

    Args:
        truths: a file that :func:`read_truths` reads; it may know more images.
        saved: a file of ``[{"image_id", "caption"}]``, as LAVIS writes it.

    Returns:
        BLEU, METEOR, ROUGE-L, CIDEr, SPICE where it can be had, and CIDEr of every domain by itself; and the captions,
        each with its own CIDEr (``correct``), in the form of :mod:`lavis_xformer.compare`'s answers.

    Raises:
        UserError: an image has no truths.
    """
    known, said = read_truths(Path(truths)), {row["image_id"]: row for row in read_json(Path(saved))}
    if unknown := said.keys() - known.captions.keys():
        raise UserError(f"{truths} has the captions of {len(said) - len(unknown)} of {len(said)} images")
    if len(said) < len(known.captions):
        logger.warning("%s knows %d images; the %d captioned ones are scored", truths, len(known.captions), len(said))
    references = tokens({image: known.captions[image] for image in said})
    candidates = tokens({image: [row["caption"]] for image, row in said.items()})
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    figures = {f"Bleu_{n}": score for n, score in enumerate(bleu, 1)}
    figures["METEOR"], _ = Meteor().compute_score(references, candidates)
    figures["ROUGE_L"], _ = Rouge().compute_score(references, candidates)
    figures["CIDEr"], each = Cider().compute_score(references, candidates)
    figures |= spice(references, candidates) | cider_by_domain(references, candidates, known.domains)
    rows = [
        {
            **row,
            "question_id": image,
            "image": str(image),
            "kind": "caption",
            "group": "caption",
            "question": "",
            "truth": known.captions[image][0],
            "correct": float(score),
            "guess": 0.0,
        }
        for (image, row), score in zip(said.items(), each, strict=True)
    ]
    return {name: float(value) for name, value in figures.items()}, rows


def tokens(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Return captions as the Penn Treebank has them, in lower case, without punctuation.

    The tokeniser reads a caption a line, so that one with a line's end in it would shift all others.
    """
    lines = {image: [{"caption": " ".join(text.split())} for text in texts] for image, texts in captions.items()}
    found: dict[int, list[str]] = PTBTokenizer().tokenize(lines)
    return found


def spice(references: Mapping[int, list[str]], candidates: Mapping[int, list[str]]) -> dict[str, float]:
    """Return SPICE; nothing where its CoreNLP is not here and can't be fetched, or this Java can't run it."""
    try:
        return {"SPICE": Spice().compute_score(references, candidates)[0]}
    except (OSError, CalledProcessError) as error:
        logger.warning(
            "no SPICE, the other scores stand: it needs Stanford CoreNLP 3.6.0, as `python -m "
            "pycocoevalcap.spice.get_stanford_models` fetches it, and a Java that runs it (%s)",
            first_line(error),
        )
        return {}


def cider_by_domain(
    references: Mapping[int, list[str]], candidates: Mapping[int, list[str]], domains: Mapping[int, str]
) -> dict[str, float]:
    """Return CIDEr of each domain's images by themselves, the frequency of words included."""
    groups: dict[str, list[int]] = defaultdict(list)
    for image in references:
        if image in domains:
            groups[domains[image]].append(image)
    figures = {}
    for domain, members in sorted(groups.items()):
        texts = ({image: of[image] for image in members} for of in (references, candidates))
        figures[f"CIDEr_{domain}"], _ = Cider().compute_score(*texts)
    return figures
