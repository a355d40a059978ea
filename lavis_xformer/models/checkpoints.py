"""Load weights into a model and say exactly what came from where.

A checkpoint holds trainable weights only, so frozen ones may be missing; anything else that is missing, unknown or of
another shape is an error that lists the keys. Two configuration keys tell what a file is:

* ``pretrained`` (or ``finetuned`` with ``load_finetuned``): a checkpoint of X-Former, of this stage or of stage 1;
* ``blip2_pretrained``: a checkpoint of LAVIS's BLIP-2; only the fusion starts anew, and with the identity
  start the loaded model gives exactly BLIP-2's outputs.

Where both are set, the first is loaded over the second, which gives what it lacks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.utils import is_url
from lavis.models.eva_vit import interpolate_pos_embed
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_xformer.assets import resolve
from lavis_xformer.errors import UserError
from lavis_xformer.models.frozen import is_frozen, train_only
from lavis_xformer.models.towers import download, load_torch_file

logger = logging.getLogger(__name__)

LISTED = 5  # names of weights that a message has, before it counts the rest
NOTHING = r"(?!)"  # the regular expression that no name matches
FUSION = r"(fusion|itg_reader)\."
CLIP = r"visual_encoder\."
CLIP_POSITIONS = "visual_encoder.pos_embed"
BROUGHT_CLIP = "brought_clip"  # a buffer: by what a checkpoint without a CLIP knows the one that a file had brought
LANGUAGE_MODEL = r"(opt|t5)_model\."  # frozen; LAVIS's files hold tied ones all the same
#: keys of ``model`` that change what weights mean, and are seen in none; without M, the first two alone
SETTINGS = ("vit_model", "token_positions", "mae_model", "mae_source", "clip_layer", "fusion_heads")


@dataclass(frozen=True)
class LoadReport:
    """What became of the weights of a model and of a file."""

    loaded: tuple[str, ...] = ()
    missing_frozen: tuple[str, ...] = ()  #: not in the file, as frozen weights should be
    missing_new: tuple[str, ...] = ()  #: not in the file, at their initial values
    unused: tuple[str, ...] = ()  #: in the file, of no use to this model

    def __str__(self) -> str:
        """Count each kind, and name what starts anew."""
        anew = f" ({_listing(self.missing_new)})" if self.missing_new else ""
        return (
            f"loaded {len(self.loaded)} weights; {len(self.missing_new)} start anew{anew}; {len(self.missing_frozen)} "
            f"frozen ones aren't in the file; {len(self.unused)} of the file's are of no use"
        )

    def __add__(self, later: LoadReport) -> LoadReport:
        """The report on two files, the later one loaded on top of this."""
        loaded = {*self.loaded, *later.loaded}
        new = {*self.missing_new, *later.missing_new} - loaded  # by now perhaps frozen, as train_only says
        return LoadReport(
            loaded=tuple(sorted(loaded)),
            missing_frozen=tuple(name for name in later.missing_frozen if name not in loaded | new),
            missing_new=tuple(sorted(new)),
            unused=tuple(sorted({*self.unused, *later.unused})),
        )


class CheckpointLoading:
    """Before a class of LAVIS: its methods that read a checkpoint, which leave out in silence what doesn't fit."""

    #: regular expressions of names: weights that only stage 1 has, and those that its checkpoints therefore lack
    STAGE1_WEIGHTS: ClassVar[str] = NOTHING
    NEW_WEIGHTS: ClassVar[str] = NOTHING
    #: what became of all that has been loaded so far
    load_report: LoadReport = LoadReport()

    def load_checkpoint(self, url_or_filename: str) -> LoadReport:
        """Load a checkpoint as ``pretrained`` does: ``load_model(..., checkpoint=FILE)`` of LAVIS ends here.

        Raises:
            UserError: the file can't be read, is BLIP-2's while the model has a fusion, or doesn't fit.
        """
        report = _load_own(self, url_or_filename, key="load_checkpoint")
        self.load_report += report
        return report

    def load_from_pretrained(self, url_or_filename: str) -> LoadReport:
        """LAVIS's other name for :meth:`load_checkpoint`."""
        return self.load_checkpoint(url_or_filename)


def load_pretrained(model: Any, cfg: DictConfig) -> LoadReport:
    """Load what the configuration names: ``blip2_pretrained``, then ``finetuned`` or ``pretrained``.

    With ``train_only`` everything else is frozen then, so that a checkpoint of such a training holds these parts alone:
    it is loaded as ``pretrained`` on top of the ``blip2_pretrained`` that the training began with, with ``train_only``
    or without. One of stage 1 may lack what is new in stage 2.

    Where nothing is named, or ``load_pretrained`` is False, the log says so; and where the file was trained under
    other :data:`SETTINGS`.

    Args:
        model: an X-Former; its ``STAGE1_WEIGHTS`` and ``NEW_WEIGHTS`` say what a file of stage 1 has beyond the model's
            weights, and lacks of them.
        cfg: the ``model`` configuration.

    Returns:
        The report on all files together.

    Raises:
        UserError: a file can't be read, is of another kind than its key says, or doesn't fit; keys that are at odds.
    """
    key = "finetuned" if cfg.get("load_finetuned", False) else "pretrained"
    wanted = cfg.get("load_pretrained", True)
    own, blip2 = (cfg.get(name) if wanted else None for name in (key, "blip2_pretrained"))
    parts = cfg.get("train_only")
    if key == "finetuned" and wanted and not own:
        raise UserError("model.load_finetuned is True, but model.finetuned names no checkpoint")
    if parts and not blip2:
        raise UserError(
            "model.train_only keeps all but these parts as BLIP-2 has them, and its checkpoints hold these alone; set "
            "model.blip2_pretrained, or model.train_only to null"
        )
    report = LoadReport()
    if not (own or blip2):
        reason = "model.pretrained names no checkpoint" if wanted else "model.load_pretrained is False"
        logger.info("%s: %s, so nothing is loaded: what is trained starts anew", type(model).__name__, reason)
    if blip2:
        report += _load_blip2(model, blip2)
        train_only(model, parts)
    if own:
        may_miss = model.NEW_WEIGHTS if blip2 else NOTHING
        report += _load_own(model, own, key=key, cfg=cfg, may_miss=may_miss, held=report.loaded)
    if lost := [name for name in report.missing_new if not model.get_parameter(name).requires_grad]:
        logger.warning("model.train_only freezes what no file brings, and no checkpoint will hold: %s", _listing(lost))
    return report


def _load_own(
    model: Any,
    source: str,
    *,
    key: str,
    cfg: DictConfig | None = None,
    may_miss: str = NOTHING,
    held: Sequence[str] = (),
) -> LoadReport:
    state, trained = _read(source, key=key)
    if is_blip2(state) and not is_frozen(model.fusion):
        raise UserError(
            f"model.{key}: '{source}' is a checkpoint of BLIP-2, without X-Former's fusion; "
            "set model.blip2_pretrained to it instead"
        )
    if cfg is not None and trained:
        _tell_other_settings(model, cfg, trained, source=source, stage1=_any(model.STAGE1_WEIGHTS, state))
    return _load_either_stage(model, state, source=source, key=key, may_miss=may_miss, held=held)


def _load_blip2(model: Any, source: str) -> LoadReport:
    key = "blip2_pretrained"
    state = read_checkpoint(source, key=key)
    if not is_blip2(state):
        raise UserError(f"model.{key}: '{source}' is a checkpoint of X-Former; set model.pretrained to it instead")
    return _load_either_stage(model, state, source=source, key=key, may_miss=FUSION)


def _load_either_stage(
    model: Any, state: dict[str, Tensor], *, source: str, key: str, may_miss: str, held: Sequence[str] = ()
) -> LoadReport:
    """Load a file of the model's own stage or of stage 1, of a frozen CLIP (which it lacks) or a trained one."""
    if _any(model.STAGE1_WEIGHTS, state):
        may_miss += f"|{model.NEW_WEIGHTS}"
    known = state.pop(BROUGHT_CLIP, None)
    brought = _bits(state)
    if brought is None:
        _check_clip(model, known, source=source, key=key)
        may_miss += f"|{CLIP}"
    if CLIP_POSITIONS in state and hasattr(model.visual_encoder, "pos_embed"):  # trained perhaps at another size
        positions = {"pos_embed": state[CLIP_POSITIONS]}
        interpolate_pos_embed(model.visual_encoder, positions)
        state[CLIP_POSITIONS] = positions["pos_embed"]
    ignored = f"{LANGUAGE_MODEL}|{model.STAGE1_WEIGHTS}"
    report = load_state(model, state, source=source, may_miss=may_miss, ignored=ignored, held=held)
    if brought is not None:
        frozen = is_frozen(model.visual_encoder)
        model.register_buffer(BROUGHT_CLIP, brought.to(model.query_tokens.device), persistent=frozen)
        if frozen:
            logger.warning("%s brings its own image encoder; checkpoints of a training that freezes it need it", source)
    return report


def _bits(state: dict[str, Tensor]) -> Tensor | None:
    """What tells a file's CLIP from others: the sum () of its weights' bits but the positions', which fit a size."""
    weights = [tensor for name, tensor in state.items() if re.match(CLIP, name) and name != CLIP_POSITIONS]
    return torch.stack([w.float().view(torch.int32).sum() for w in weights]).sum() if weights else None


def _check_clip(model: Any, known: Tensor | None, *, source: str, key: str) -> None:
    """Refuse a file that was trained on top of a CLIP which another file had brought, and which isn't here."""
    here = getattr(model, BROUGHT_CLIP, None)
    if known is not None and (here is None or known.item() != here.item()):
        raise UserError(
            f"model.{key}: '{source}' was trained with a frozen image encoder that another file had brought, which is "
            "not loaded; set model.blip2_pretrained to that file too, or load what `lavis-xformer export` makes of this"
        )
    if known is None and here is not None:
        logger.warning("%s has no mark of the image encoder that is loaded; was it trained with another?", source)


def _tell_other_settings(model: Any, cfg: DictConfig, trained: dict[str, Any], *, source: str, stage1: bool) -> None:
    """Warn where a file's configuration has other :data:`SETTINGS`; positions that stage 2 adds are its own affair."""
    told = []
    for name in SETTINGS if model.fusion.needs_mae else SETTINGS[:2]:
        theirs, ours = (_setting(config, name) for config in (trained, cfg))
        added = name == "token_positions" and stage1 and set(theirs) <= set(ours)
        if theirs != ours and not added:
            told.append(f"{name} {theirs}, here {ours}")
    if told:
        logger.warning("%s was trained with other settings, which no weight shows: %s", source, "; ".join(told))


def _setting(config: Any, name: str) -> Any:
    """A key's value to compare: of paths the last part, since the same model may lie elsewhere."""
    value = config.get(name)
    if name == "token_positions":
        return sorted(value or [])
    if name == "mae_source":
        return value or "mae"
    return Path(value).name if isinstance(value, str) else value


def read_checkpoint(source: str, *, key: str) -> dict[str, Tensor]:
    """Read the weights of a checkpoint; pickled code is refused.

    Args:
        source: a URL, a ``.safetensors`` file, an exported folder, a LAVIS ``.pth`` file, or a shipped one
            (``assets://...``).
        key: the configuration key that named it, for messages.

    Raises:
        UserError: the file is missing, torn, or holds more than tensors and plain values.
    """
    return _read(source, key=key)[0]


def _read(source: str, *, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and the ``model`` configuration that they were trained with, empty where the file doesn't say."""
    path = Path(download(source, key=key) if is_url(source) else resolve(source))
    config: Any = {}
    if path.is_dir():
        config = OmegaConf.load(path / "config.yaml") if (path / "config.yaml").is_file() else {}
        path /= "model.safetensors"
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"model.{key}: there is no file '{path}'")
        try:
            return load_file(path), config.get("model", {})
        except SafetensorError as error:
            raise UserError(f"model.{key}: '{path}' is no intact file of tensors: {error}") from error
    content = load_torch_file(path, key=key)
    state, config = content.get("model", content), content.get("config")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.{key}: '{path}' has no weights under its key 'model'")
    return state, config.get("model", {}) if isinstance(config, dict) else {}


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str,
    may_miss: str = NOTHING,
    ignored: str = NOTHING,
    held: Sequence[str] = (),
) -> LoadReport:
    """Load a state dict and account for every weight.

    Args:
        model: changed in place.
        state: the file's weights.
        source: its name, for messages.
        may_miss: regular expression of trainable weights that the file may lack.
        ignored: regular expression of weights in the file that are left there.
        held: weights that the file may lack, because an earlier one has brought them.

    Raises:
        UserError: a weight is missing, unknown or of another shape; the model is unchanged then.
    """
    own = model.state_dict()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = {name for name in state if re.match(ignored, name)}
    brought = state.keys() - unused
    missing = own.keys() - brought
    wanted = (missing & trainable) - set(held)
    new = {name for name in wanted if re.match(may_miss, name)}
    loaded = own.keys() & brought
    _check(
        f"'{source}' doesn't fit {type(model).__name__}",
        {
            "missing": wanted - new,
            "unknown": brought - own.keys(),
            "of another shape": {
                f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
                for name in loaded
                if state[name].shape != own[name].shape
            },
        },
    )
    model.load_state_dict({name: state[name] for name in loaded}, strict=False)  # the rest is accounted for above
    report = LoadReport(
        loaded=tuple(sorted(loaded)),
        missing_frozen=tuple(sorted(missing - trainable)),
        missing_new=tuple(sorted(new)),
        unused=tuple(sorted(unused)),
    )
    logger.info("%s: %s", source, report)
    return report


def _check(what: str, problems: dict[str, Set[str]]) -> None:
    """Raise a UserError that lists the problems by kind, if there are any; the log has each list in full."""
    listed = [f"{kind}: {_listing(sorted(names))}" for kind, names in problems.items() if names]
    if listed:
        for kind, names in problems.items():
            if len(names) > LISTED:
                logger.error("%s; %s, all %d: %s", what, kind, len(names), ", ".join(sorted(names)))
        raise UserError(f"{what}; {'; '.join(listed)}")


def is_blip2(state: dict[str, Tensor]) -> bool:
    """Whether a file's weights are BLIP-2's, without a fusion."""
    return not _any(FUSION, state)


def _any(pattern: str, state: dict[str, Tensor]) -> bool:
    return any(re.match(pattern, name) for name in state)


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
