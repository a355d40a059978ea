"""Named protocols: how a model is asked for answers and captions, as recorded in every result file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lavis.common.registry import registry

from lavis_xformer import distributed
from lavis_xformer.engine import jobs
from lavis_xformer.errors import UserError, one_of, template, text, whole
from lavis_xformer.files import sha256, write_json, write_text

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How a question is asked, or a caption requested.

    Attributes:
        name: of the protocol.
        prompt: ``{}`` stands for the question.
        num_beams: 1 means greedy.
        length_penalty: of beam search; None leaves it to the model (``model.vqa_length_penalty``).
        max_len: maximum tokens of an answer or caption.
        min_len: minimum tokens.
    """

    name: str
    prompt: str
    num_beams: int = 5
    length_penalty: float | None = None
    max_len: int = 10
    min_len: int = 1


#: BLIP-2's paper (arXiv 2301.12597, appendix), and LAVIS's YAMLs and tasks, which never pass a length penalty
PROTOCOLS = {
    "paper": Protocol("paper", "Question: {} Answer:", length_penalty=-1.0),
    "lavis": Protocol("lavis", "Question: {} Short answer:"),
}
#: the same for captions, where both agree: prompt and beams are the paper's, the lengths from LAVIS's YAMLs
CAPTION_PROTOCOLS = {
    name: Protocol(name, "a photo of", length_penalty=1.0, max_len=30, min_len=8) for name in ("paper", "lavis")
}
#: stage 1 ranks by ITC, then re-ranks the best ``k_test`` by ITM
RETRIEVAL_PROTOCOLS = {name: {"name": name, "k_test": 128} for name in ("paper", "lavis")}

PROTOCOL_KEYS = ("prompt", "num_beams", "max_len", "min_len")  # keys of ``run:`` that override the protocol's


def chosen(run: Any, protocols: Mapping[str, Any]) -> Any:
    """Return the protocol that ``run.protocol`` names, ``paper`` by default.

    Raises:
        UserError: there is no such protocol.
    """
    return protocols[one_of("run.protocol", run.get("protocol", "paper"), protocols)]


def protocol_of(run: Any, protocols: Mapping[str, Protocol] = PROTOCOLS) -> Protocol:
    """Return the protocol that ``run.protocol`` names, with the run's overrides.

    Raises:
        UserError: there is no such protocol, or an override makes no sense.
    """
    changes = {key: run[key] for key in PROTOCOL_KEYS if run.get(key) is not None}
    named = chosen(run, protocols)
    protocol: Protocol = replace(named, **changes)
    (template if "{}" in named.prompt else text)("run.prompt", protocol.prompt)
    whole("run.max_len", protocol.max_len, least=1)
    if whole("run.min_len", protocol.min_len, least=0) > protocol.max_len:
        raise UserError(f"run.min_len is {protocol.min_len}; it can't be greater than run.max_len, {protocol.max_len}")
    return protocol


class WithProtocol:
    """Mixin before a LAVIS task: asks by ``run.protocol`` and records it."""

    CONFIG_KEYS: ClassVar[frozenset[str]] = frozenset({"protocol", *PROTOCOL_KEYS})
    PROTOCOLS: ClassVar[Mapping[str, Protocol]] = PROTOCOLS
    #: key of ``model`` that has the prompt in training
    MODEL_PROMPT: ClassVar[str] = "vqa_prompt"
    protocol: Protocol
    config: dict[str, Any]

    @classmethod
    def setup_task(cls, cfg: Any) -> Any:
        """Read LAVIS's settings, then ``run.protocol`` and the run's overrides of it.

        Raises:
            UserError: there is no such protocol.
        """
        protocol = protocol_of(cfg.run_cfg, cls.PROTOCOLS)
        for name in PROTOCOL_KEYS:
            cfg.run_cfg[name] = getattr(protocol, name)  # LAVIS has no defaults for some
        task = super().setup_task(cfg)  # type: ignore[misc]
        task.protocol, task.config = protocol, cfg.to_dict()
        task.tell_prompt()
        return task

    def tell_prompt(self) -> None:
        """Warn if a run that trains with one prompt evaluates with another."""
        run, trained = self.config["run"], self.config.get("model", {}).get(self.MODEL_PROMPT)
        both = not run.get("evaluate") and (run.get("valid_splits") or run.get("test_splits"))
        if both and trained and trained != self.protocol.prompt:
            logger.warning(
                "trained with model.%s '%s', evaluated with run.prompt '%s'; set one to the other to have the same",
                self.MODEL_PROMPT,
                trained,
                self.protocol.prompt,
            )

    @staticmethod
    def save_result(result: Sequence[Row], result_dir: str, filename: str, remove_duplicate: str = "") -> str:
        """Write the rows of all ranks as LAVIS does, whose own takes quadratic time; return the file's path.

        Args:
            result: the rows of this rank.
            result_dir: folder of the file.
            filename: its name, without ``.json``.
            remove_duplicate: a key; of rows with equal values, the first is kept.
        """
        path = Path(result_dir) / f"{filename}.json"
        rows = [row for part in distributed.collect(result) for row in part]
        if remove_duplicate:
            first: dict[Any, Row] = {}
            for row in rows:
                first.setdefault(row[remove_duplicate], row)
            rows = list(first.values())
        if distributed.is_main():
            write_text(path, json.dumps(rows))
        return str(path)

    def write(self, split: str, figures: Mapping[str, float], *, scorer: str, said: Sequence[Row], **more: Any) -> Path:
        """Write ``result/<split>_<dataset>.json`` and return its path, see :func:`write_result`."""
        how = asdict(self.protocol)
        return write_result(self.config, split, how, figures, scorer=scorer, answers=list(said), **more)


def write_result(
    config: Row,
    split: str,
    protocol: Row,
    figures: Mapping[str, float],
    *,
    question_sha256: Mapping[str, str] | None = None,
    **more: Any,
) -> Path:
    """Write ``result/<split>_<dataset>.json`` and return its path.

    It holds figures, protocol, sha256 of each question file (by default LAVIS's annotation files of the split),
    ``more``, configuration and versions.
    """
    datasets = config["datasets"]
    name = next((name for name, dataset in datasets.items() if _files(dataset, split)), next(iter(datasets)))
    given = _files(datasets[name], split)
    storage = given.get("storage") or given.get("annotations") or []
    paths = [storage] if isinstance(storage, str) else storage
    if question_sha256 is None:
        files = {file: Path(file).expanduser() for file in paths}
        question_sha256 = {file: sha256(path) for file, path in files.items() if path.is_file()}
    report = {
        "benchmark": name,
        "split": split,
        "protocol": protocol,
        "question_sha256": dict(question_sha256),
        "figures": dict(figures),
        **more,
        "config": config,
        "versions": jobs.versions(),
    }
    path = Path(registry.get_path("result_dir")) / f"{split}_{name}.json"
    write_json(path, report)
    return path


def tell_unanswered(count: int, total: int, file: Path) -> None:
    """Warn of questions that can't be scored for want of a true answer; ``file`` has what was said to them."""
    if count:
        logger.warning("%d of %d questions have no true answer; the model's answers are in %s", count, total, file)


def _files(dataset: Row, split: str) -> Row:
    """Where a dataset's configuration has the files of a split: LAVIS's datasets, or this package's; {} without any."""
    lavis, ours = dataset.get("build_info", {}).get("annotations", {}), dataset.get("splits", {})
    return lavis.get(split) or ours.get(split) or {}
