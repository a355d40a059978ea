"""Caption metrics by pycocoevalcap, as in LAVIS: against COCO's reference captions or those of a file."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which
from subprocess import CalledProcessError
from typing import NamedTuple

from lavis.common.registry import registry
from pycocoevalcap.eval import Bleu, Cider, Meteor, PTBTokenizer, Rouge, Spice
from torchvision.datasets.utils import download_url

from lavis_xformer.config.files import check_file
from lavis_xformer.errors import UserError, first_line
from lavis_xformer.files import read_json
from lavis_xformer.tasks.protocols import Row
from lavis_xformer.tasks.rows import answer_row

logger = logging.getLogger(__name__)

#: LAVIS's download of the reference captions of COCO's Karpathy splits, val and test
TRUTHS_URL = "https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_{}_gt.json"


class Truths(NamedTuple):
    """Reference captions, and the domains of images that have one, both by image id."""

    captions: dict[int, list[str]]
    domains: dict[int, str]


def check_scoring(truths: str | None, datasets: Sequence[str]) -> None:
    """Check, before anything is captioned, what scoring needs besides downloads.

    Raises:
        UserError: there are no reference captions, they are not in COCO's format, or there is no Java.
    """
    own = any(getattr(registry.get_builder_class(name), "HAS_REFERENCES", False) for name in datasets)
    if not truths and not own and "coco_caption" not in datasets:
        raise UserError(
            f"run.report_metric: LAVIS has reference captions for coco_caption only, not for {', '.join(datasets)}; "
            "set run.caption_truths to a file in COCO's format, or run.report_metric to False"
        )
    if truths:
        check_file("run.caption_truths", truths)
        read_truths(Path(truths))
    if which("java") is None:
        raise UserError(
            "run.report_metric: pycocoevalcap scores captions with Java, and there is no `java` on the PATH; install a "
            "Java runtime (8 or newer), or set run.report_metric to False, which keeps the captions unscored"
        )


def fetch_truths(split: str) -> Path:
    """Return the file of COCO's captions of a Karpathy split, downloaded into LAVIS's cache if needed.

    Raises:
        UserError: it can't be downloaded.
    """
    url, folder = TRUTHS_URL.format(split), Path(registry.get_path("cache_root")) / "coco_gt"
    try:
        download_url(url, str(folder))
    except OSError as error:
        raise UserError(
            f"{url} can't be downloaded ({first_line(error)}); put a copy in {folder}, or set run.caption_truths to a "
            "file with the captions of all splits that the run scores"
        ) from error
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
        raise UserError(f"reference captions: {file} is not in COCO's format, {wanted}: {error!r}") from error
    return Truths(dict(captions), domains)


def scored(truths: str | Path | Truths, saved: str | Path) -> tuple[dict[str, float], list[Row]]:
    """Score captions by pycocoevalcap, as LAVIS does.

    Args:
        truths: a file that :func:`read_truths` reads, or what it holds; there may be more images.
        saved: a file of ``[{"image_id", "caption"}]``, as LAVIS writes it.

    Returns:
        BLEU, METEOR, ROUGE-L, CIDEr, SPICE where available, and CIDEr of every domain; and the captions, each with its
        own CIDEr (``correct``), in the form of :mod:`lavis_xformer.compare`'s answers.

    Raises:
        UserError: an image has no reference captions.
    """
    known = truths if isinstance(truths, Truths) else read_truths(Path(truths))
    said = {row["image_id"]: row for row in read_json(Path(saved))}
    if unknown := said.keys() - known.captions.keys():
        raise UserError(f"{truths} has captions for only {len(said) - len(unknown)} of {len(said)} images")
    if len(said) < len(known.captions):
        logger.warning("%d images have references; only the %d captioned are scored", len(known.captions), len(said))
    references = tokens({image: known.captions[image] for image in said})
    candidates = tokens({image: [row["caption"]] for image, row in said.items()})
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    figures = {f"Bleu_{n}": score for n, score in enumerate(bleu, 1)}
    figures["METEOR"], _ = Meteor().compute_score(references, candidates)
    figures["ROUGE_L"], _ = Rouge().compute_score(references, candidates)
    figures["CIDEr"], each = Cider().compute_score(references, candidates)
    figures |= spice(references, candidates) | cider_by_domain(references, candidates, known.domains)
    rows = [
        row
        | answer_row(
            image,
            image=row.get("image", str(image)),
            kind="caption",
            correct=float(score),
            guess=0.0,
            truth=known.captions[image][0],
        )
        for (image, row), score in zip(said.items(), each, strict=True)
    ]
    return {name: float(value) for name, value in figures.items()}, rows


def tokens(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Return captions tokenised as in the Penn Treebank, in lower case, without punctuation.

    The tokeniser reads one caption per line, so a line break within a caption would shift all others.
    """
    lines = {image: [{"caption": " ".join(text.split())} for text in texts] for image, texts in captions.items()}
    found: dict[int, list[str]] = PTBTokenizer().tokenize(lines)
    return found


def spice(references: Mapping[int, list[str]], candidates: Mapping[int, list[str]]) -> dict[str, float]:
    """Return SPICE; nothing if its CoreNLP is missing and can't be downloaded, or this Java can't run it."""
    try:
        return {"SPICE": Spice().compute_score(references, candidates)[0]}
    except (OSError, CalledProcessError) as error:
        logger.warning(
            "SPICE is skipped, the other scores are valid: it needs Stanford CoreNLP 3.6.0, which `python -m "
            "pycocoevalcap.spice.get_stanford_models` downloads, and a Java that runs it (%s)",
            first_line(error),
        )
        return {}


def cider_by_domain(
    references: Mapping[int, list[str]], candidates: Mapping[int, list[str]], domains: Mapping[int, str]
) -> dict[str, float]:
    """Return CIDEr per domain, with document frequencies from that domain's images only."""
    groups: dict[str, list[int]] = defaultdict(list)
    for image in references:
        if image in domains:
            groups[domains[image]].append(image)
    figures = {}
    for domain, members in sorted(groups.items()):
        texts = ({image: of[image] for image in members} for of in (references, candidates))
        figures[f"CIDEr_{domain}"], _ = Cider().compute_score(*texts)
    return figures
