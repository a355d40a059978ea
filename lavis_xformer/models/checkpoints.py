"""Load checkpoints into a model, and report exactly which weights came from where.

A checkpoint holds trainable weights only, so frozen ones may be missing; any other weight that is missing, unknown or
of another shape is an error that lists the names. Two configuration keys tell what kind of file it is:

* ``pretrained`` (or ``finetuned`` with ``load_finetuned``): a checkpoint of X-Former, of this stage or of stage 1;
* ``blip2_pretrained``: a checkpoint of LAVIS's BLIP-2; only the fusion is newly initialised, and with the identity
  start the loaded model gives exactly BLIP-2's outputs.

If both are set, ``pretrained`` is loaded on top of ``blip2_pretrained``, which provides what it lacks.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.utils import is_url
from lavis.models.eva_vit import interpolate_pos_embed
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from lavis_xformer.assets import resolve
from lavis_xformer.errors import UserError
from lavis_xformer.models.frozen import is_frozen, train_only
from lavis_xformer.models.weight_files import download, load_safetensors, load_torch_file
from lavis_xformer.paths import checkpoints_of
from lavis_xformer.state_dicts import NOTHING, LoadReport, listing, load_state

logger = logging.getLogger(__name__)

FUSION = r"(fusion|itg_reader)\."
CLIP = r"visual_encoder\."
CLIP_POSITIONS = "visual_encoder.pos_embed"
BROUGHT_CLIP = "brought_clip"  # a buffer: fingerprint of an image encoder that came from a file, not from vit_model
LANGUAGE_MODEL = r"(opt|t5)_model\."  # frozen; LAVIS's files nevertheless hold its tied weights
ELSEWHERE = ("visual_encoder", "mae", "opt_model", "t5_model")  # parts that come from files of their own
PROJECTION = r"(opt|t5)_proj\."  # to the language model: stage 2 has it, stage 1 doesn't
#: keys of ``model`` that change what the weights mean without changing their shapes; the second kind only with M
SETTINGS = ("vit_model", "opt_model", "t5_model", "token_positions")
SETTINGS_OF_M = ("mae_model", "mae_source", "clip_layer", "fusion_heads")


class CheckpointLoading:
    """A mixin that replaces LAVIS's checkpoint methods, which silently skip whatever doesn't fit."""

    #: regular expressions of names: weights that only stage 1 has, and weights that stage-1 checkpoints lack
    STAGE1_WEIGHTS: ClassVar[str] = NOTHING
    NEW_WEIGHTS: ClassVar[str] = NOTHING
    #: everything that has been loaded so far
    load_report: LoadReport = LoadReport()
    #: the ``model`` configuration that it was built from, with which those of files are compared
    built_from: DictConfig | None = None

    @property
    def untrained(self) -> str:
        """The trainable weights that no file has brought: "" for none, "all" where nothing has been loaded."""
        return listing(self.load_report.missing_new) if self.load_report.loaded else "all"

    def load_checkpoint(self, url_or_filename: str | Path) -> LoadReport:
        """Load a checkpoint as ``pretrained`` does: ``load_model(..., checkpoint=FILE)`` of LAVIS ends here.

        Raises:
            UserError: the file can't be read, doesn't fit, or is BLIP-2's although the model has a fusion.
        """
        report = _load_own(self, str(url_or_filename), key="load_checkpoint", cfg=self.built_from)
        if report.missing_new:
            logger.warning("%s has no %s, which stay as they are", url_or_filename, listing(report.missing_new))
        self.load_report += report
        return report

    def load_from_pretrained(self, url_or_filename: str | Path) -> LoadReport:
        """LAVIS's other name for :meth:`load_checkpoint`."""
        return self.load_checkpoint(url_or_filename)


def load_pretrained(model: Any, cfg: DictConfig) -> LoadReport:
    """Load what the configuration names: ``blip2_pretrained``, then ``finetuned`` or ``pretrained``.

    With ``train_only`` everything else is then frozen, so checkpoints of such a training hold only these parts: load
    them as ``pretrained`` on top of the ``blip2_pretrained`` that the training started from, with ``train_only`` or
    without. A checkpoint of stage 1 may lack what is new in stage 2.

    The log says if nothing is loaded, and if the file was trained with other :data:`SETTINGS`.

    Args:
        model: an X-Former; its ``STAGE1_WEIGHTS`` and ``NEW_WEIGHTS`` say which weights a file of stage 1 has in
            addition to the model's, and which it lacks.
        cfg: the ``model`` configuration.

    Returns:
        The report on all files together.

    Raises:
        UserError: a file can't be read, doesn't fit, or isn't what its key says; two keys contradict each other.
    """
    check_loading(cfg)
    model.built_from = cfg
    key = "finetuned" if cfg.get("load_finetuned", False) else "pretrained"
    files = checkpoints_of(cfg)
    own, blip2 = files.get(key), files.get("blip2_pretrained")
    report = LoadReport()
    if not (own or blip2):
        wanted = cfg.get("load_pretrained", True)
        reason = "model.pretrained names no checkpoint" if wanted else "model.load_pretrained is False"
        logger.info("%s: %s; all trainable weights are untrained", type(model).__name__, reason)
    if blip2:
        report += _load_blip2(model, blip2, cfg)
        train_only(model, cfg.get("train_only"))
    if own:
        may_miss = model.NEW_WEIGHTS if blip2 else NOTHING
        report += _load_own(model, own, key=key, cfg=cfg, may_miss=may_miss, held=report.loaded)
    if lost := [name for name in report.missing_new if not model.get_parameter(name).requires_grad]:
        logger.warning("model.train_only freezes weights that are in no file and no checkpoint: %s", listing(lost))
    return report


def check_loading(cfg: DictConfig) -> None:
    """Check, before anything is built, that the keys of ``model`` that name checkpoints do not contradict each other.

    Raises:
        UserError: they do.
    """
    wanted, parts = cfg.get("load_pretrained", True), cfg.get("train_only")
    if wanted and cfg.get("load_finetuned", False) and not cfg.get("finetuned"):
        raise UserError("model.load_finetuned is True, but model.finetuned names no checkpoint")
    if parts and not wanted:
        raise UserError("model.load_pretrained is False, but model.train_only needs BLIP-2's weights; leave one out")
    if parts and not cfg.get("blip2_pretrained"):
        raise UserError(
            "model.train_only keeps everything else as in BLIP-2, and its checkpoints hold only the trained parts; set "
            "model.blip2_pretrained, or set model.train_only to null"
        )


def _load_own(
    model: Any,
    source: str,
    *,
    key: str,
    cfg: DictConfig | None = None,
    may_miss: str = NOTHING,
    held: Sequence[str] = (),
) -> LoadReport:
    state, trained = read_checkpoint(source, key=key)
    if is_blip2(state) and not is_frozen(model.fusion):
        raise UserError(
            f"model.{key}: '{source}' is a checkpoint of BLIP-2, without X-Former's fusion; "
            "set model.blip2_pretrained to it instead"
        )
    if model.NEW_WEIGHTS == NOTHING and _any(PROJECTION, state):
        raise UserError(f"model.{key}: '{source}' is a checkpoint of stage 2; stage 1 can't start from it")
    if cfg is not None and trained:
        stage1 = model.NEW_WEIGHTS != NOTHING and not (trained.get("opt_model") or trained.get("t5_model"))
        names = (*SETTINGS, *(SETTINGS_OF_M if model.fusion.needs_mae else ()))
        _tell_other_settings(names, cfg, trained, source=source, may_add_positions=stage1)
    try:
        return _load_either_stage(model, state, source=source, key=key, may_miss=may_miss, held=held)
    except UserError as error:
        raise UserError(f"{error}{_whose(trained, cfg)}") from error


def _whose(trained: Mapping[str, Any], cfg: DictConfig | None) -> str:
    """What a file that doesn't fit says about itself, to add to the message: another model, or parts of one."""
    if (parts := trained.get("train_only")) and (cfg is None or not cfg.get("blip2_pretrained")):
        below = trained.get("blip2_pretrained")
        return f". It holds only {list(parts)}: set model.blip2_pretrained to the file that it was trained on, {below}"
    if cfg is not None and (theirs := trained.get("arch")) not in (None, cfg.get("arch")):
        return f". It is of model.arch {theirs}"
    return ""


def _load_blip2(model: Any, source: str, cfg: DictConfig) -> LoadReport:
    key = "blip2_pretrained"
    state, trained = read_checkpoint(source, key=key)
    if not is_blip2(state):
        raise UserError(f"model.{key}: '{source}' is a checkpoint of X-Former; set model.pretrained to it instead")
    if trained:
        _tell_other_settings(SETTINGS, cfg, trained, source=source, may_add_positions=True)
    return _load_either_stage(model, state, source=source, key=key, may_miss=FUSION)


def _load_either_stage(
    model: Any, state: dict[str, Tensor], *, source: str, key: str, may_miss: str, held: Sequence[str] = ()
) -> LoadReport:
    """Load a file of the model's own stage or of stage 1; it holds CLIP's weights only if CLIP was trained."""
    if _any(model.STAGE1_WEIGHTS, state):
        may_miss += f"|{model.NEW_WEIGHTS}"
    if CLIP_POSITIONS in state and hasattr(model.visual_encoder, "pos_embed"):  # perhaps of another image size
        positions = {"pos_embed": state[CLIP_POSITIONS]}
        interpolate_pos_embed(model.visual_encoder, positions)
        state[CLIP_POSITIONS] = positions["pos_embed"]
    known = state.pop(BROUGHT_CLIP, None)
    had_clip = _any(CLIP, state)
    if key != "blip2_pretrained":  # which marks the checkpoints that are trained on its image encoder
        state = _without_known(model, state)
    brought = _fingerprint(state)
    if brought is None and not had_clip:
        _check_clip(model, known, source=source, key=key)
    _tell_other_language_model(model, state, source=source)
    ignored = f"{LANGUAGE_MODEL}|{model.STAGE1_WEIGHTS}"
    built = CLIP if brought is None else NOTHING
    report = load_state(model, state, source=source, may_miss=may_miss, built=built, ignored=ignored, held=held)
    if brought is not None:
        frozen = is_frozen(model.visual_encoder)
        model.register_buffer(BROUGHT_CLIP, brought.to(model.query_tokens.device), persistent=frozen)
        if frozen:
            logger.warning("%s comes with its own image encoder; checkpoints trained on it need this file too", source)
    return report


def _fingerprint(state: dict[str, Tensor]) -> Tensor | None:
    """A file's CLIP as a number (): 8 bytes of its weights' SHA-256, without the positions, which may be resized."""
    names = sorted(name for name in state if re.match(CLIP, name) and name != CLIP_POSITIONS)
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        digest.update(state[name].float().contiguous().numpy().data)
    return torch.tensor(int.from_bytes(digest.digest()[:8], "big", signed=True))


def _without_known(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights without frozen parts that the model already has, for a user may save every weight."""
    own = model.state_dict()
    for part, module in model.named_children():
        names = {name for name in own if name.startswith(f"{part}.") and part in ELSEWHERE}
        if is_frozen(module) and all(name in state and _equal(state[name], own[name]) for name in names):
            state = {name: weight for name, weight in state.items() if name not in names}
    return state


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    """Whether a file's weight is the model's, in the model's precision."""
    return theirs.shape == ours.shape and torch.equal(theirs.to(ours), ours)


def _tell_other_language_model(model: Any, state: dict[str, Tensor], *, source: str) -> None:
    """Warn if a file holds a trained language model, whose weights a frozen one doesn't take."""
    own = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    names = [name for name in state if re.match(LANGUAGE_MODEL, name) and name in own]
    if other := [name for name in names if not _equal(state[name], own[name])]:
        logger.warning(
            "%s holds another language model, which is not loaded (%s): set requires_grad of its weights first",
            source,
            listing(other),
        )


def _check_clip(model: Any, known: Tensor | None, *, source: str, key: str) -> None:
    """Refuse a file that was trained on an image encoder from another file that isn't loaded here."""
    here = getattr(model, BROUGHT_CLIP, None)
    if known is not None and (here is None or known.item() != here.item()):
        raise UserError(
            f"model.{key}: '{source}' was trained with a frozen image encoder from another file, which is not loaded; "
            "set model.blip2_pretrained to that file too, or load what `lavis-xformer export` makes of this one"
        )
    if known is None and here is not None:
        logger.warning("%s doesn't record the image encoder that is loaded; was it trained with another one?", source)


def _tell_other_settings(
    names: Sequence[str], cfg: DictConfig, trained: dict[str, Any], *, source: str, may_add_positions: bool
) -> None:
    """Warn if a file was trained with other settings; a further stage may add positions to those of the file."""
    told = []
    for name in names:
        theirs, ours = (_setting(config, name) for config in (trained, cfg))
        if theirs is None and name.endswith("_model"):
            continue  # a file of stage 1 names no language model, one of LAVIS perhaps no encoder
        added = name == "token_positions" and may_add_positions and set(theirs) <= set(ours)
        if theirs != ours and not added:
            told.append(f"{name} {theirs}, here {ours}")
    if told:
        logger.warning("%s was trained with other settings, which its weights don't show: %s", source, "; ".join(told))


def _setting(config: Any, name: str) -> Any:
    """A key's value for comparison; of a path only the last part, since the same model may be stored elsewhere."""
    value = config.get(name)
    if name == "token_positions":
        return sorted(value or [])
    if name == "mae_source":
        return value or "mae"
    return Path(value).name if isinstance(value, str) else value


def read_checkpoint(source: str, *, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint; pickled code is refused.

    Args:
        source: a URL, a ``.safetensors`` file, an exported folder, a LAVIS ``.pth`` file, or a shipped one
            (``assets://...``).
        key: the configuration key that named it, for messages.

    Returns:
        Its weights, and the ``model`` configuration that they were trained with, empty if the file doesn't have it.

    Raises:
        UserError: the file is missing or truncated, or holds more than tensors and plain values.
    """
    path = Path(download(source, key=key) if is_url(source) else resolve(source))
    config: Any = {}
    if path.is_dir():
        config = OmegaConf.load(path / "config.yaml") if (path / "config.yaml").is_file() else {}
        path /= "model.safetensors"
    if path.suffix == ".safetensors":
        return load_safetensors(path, key=key), config.get("model", {})
    content = load_torch_file(path, key=key)
    state, config = content.get("model", content), content.get("config")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.{key}: '{path}' has no weights under its key 'model'")
    consume_prefix_in_state_dict_if_present(state, "module.")  # of a model in DistributedDataParallel
    return state, config.get("model", {}) if isinstance(config, dict) else {}


def is_blip2(state: dict[str, Tensor]) -> bool:
    """Whether a file's weights are BLIP-2's: queries without a fusion."""
    return "query_tokens" in state and not _any(FUSION, state)


def _any(pattern: str, state: dict[str, Tensor]) -> bool:
    return any(re.match(pattern, name) for name in state)
