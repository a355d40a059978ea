"""Load weights into a model and say exactly what came from where.

A checkpoint holds trainable weights only, so frozen ones may be missing; anything else that is missing, unknown or of
another shape is an error that lists the keys. Two configuration keys tell what a file is:

* ``pretrained`` (or ``finetuned`` with ``load_finetuned``): a checkpoint of X-Former, of this stage or of stage 1;
* ``blip2_pretrained``: a checkpoint of LAVIS's BLIP-2; only the fusion starts anew, and with the identity
  start the loaded model gives exactly BLIP-2's outputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis.common.utils import is_url
from lavis.models.eva_vit import interpolate_pos_embed
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_xformer.assets import resolve
from lavis_xformer.errors import UserError, nearest
from lavis_xformer.models.frozen import freeze, is_frozen
from lavis_xformer.models.towers import download, load_torch_file

logger = logging.getLogger(__name__)

NOTHING = r"(?!)"  # the regular expression that no name matches
FUSION = r"(fusion|itg_reader)\."
CLIP = r"visual_encoder\."
CLIP_POSITIONS = "visual_encoder.pos_embed"
LANGUAGE_MODEL = r"(opt|t5)_model\."  # frozen; LAVIS's files hold tied ones all the same


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
    it is loaded as ``pretrained`` on top of the ``blip2_pretrained`` that the training began with. One of stage 1 may
    lack what is new in stage 2.

    Where nothing is named, or ``load_pretrained`` is False, the log says so.

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
    if own and blip2 and not parts:
        raise UserError(f"model.{key} and model.blip2_pretrained are both set; keep one of them")
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
        report += _load_own(model, own, key=key, may_miss=model.NEW_WEIGHTS if parts else NOTHING)
    if lost := [name for name in report.missing_new if not model.get_parameter(name).requires_grad]:
        logger.warning("model.train_only freezes what no file brings, and no checkpoint will hold: %s", _listing(lost))
    return report


def train_only(model: nn.Module, parts: Sequence[str] | None) -> None:
    """Freeze all but some parts, such as ``["fusion"]`` on top of a trained BLIP-2.

    Args:
        model: changed in place.
        parts: names of its children; None or none at all changes nothing.

    Raises:
        UserError: there is no such part, or nothing in it could be trained.
    """
    if not parts:
        return
    children = dict(model.named_children())
    for name in parts:
        if name not in children or is_frozen(children[name]):
            known = [part for part, child in children.items() if not is_frozen(child)]
            raise UserError(f"model.train_only: '{name}' can't be trained; {nearest(name, known)}")
    for name, child in children.items():
        if name not in parts:
            freeze(child)
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad_(False)


def _load_own(model: Any, source: str, *, key: str, may_miss: str = NOTHING) -> LoadReport:
    state = read_checkpoint(source, key=key)
    if is_blip2(state) and not is_frozen(model.fusion):
        raise UserError(
            f"model.{key}: '{source}' is a checkpoint of BLIP-2, without X-Former's fusion; "
            "set model.blip2_pretrained to it instead"
        )
    return _load_either_stage(model, state, source=source, may_miss=may_miss)


def _load_blip2(model: Any, source: str) -> LoadReport:
    state = read_checkpoint(source, key="blip2_pretrained")
    if not is_blip2(state):
        raise UserError(
            f"model.blip2_pretrained: '{source}' is a checkpoint of X-Former; set model.pretrained to it instead"
        )
    return _load_either_stage(model, state, source=source, may_miss=FUSION)


def _load_either_stage(model: Any, state: dict[str, Tensor], *, source: str, may_miss: str) -> LoadReport:
    """Load a file of the model's own stage or of stage 1, of a frozen CLIP (which it lacks) or a trained one."""
    if _any(model.STAGE1_WEIGHTS, state):
        may_miss += f"|{model.NEW_WEIGHTS}"
    if not _any(CLIP, state):
        may_miss += f"|{CLIP}"
    elif is_frozen(model.visual_encoder):
        logger.warning("%s brings its own image encoder; checkpoints of a training that freezes it won't", source)
    if CLIP_POSITIONS in state and hasattr(model.visual_encoder, "pos_embed"):  # trained perhaps at another size
        positions = {"pos_embed": state[CLIP_POSITIONS]}
        interpolate_pos_embed(model.visual_encoder, positions)
        state[CLIP_POSITIONS] = positions["pos_embed"]
    ignored = f"{LANGUAGE_MODEL}|{model.STAGE1_WEIGHTS}"
    return load_state(model, state, source=source, may_miss=may_miss, ignored=ignored)


def read_checkpoint(source: str, *, key: str) -> dict[str, Tensor]:
    """Read the weights of a checkpoint; pickled code is refused.

    Args:
        source: a URL, a ``.safetensors`` file, a LAVIS ``.pth`` file, or a shipped one (``assets://...``).
        key: the configuration key that named it, for messages.

    Raises:
        UserError: the file is missing, torn, or holds more than tensors and plain values.
    """
    path = download(source, key=key) if is_url(source) else str(resolve(source))
    if Path(path).is_dir():
        path = str(Path(path) / "model.safetensors")
    if path.endswith(".safetensors"):
        if not Path(path).is_file():
            raise UserError(f"model.{key}: there is no file '{path}'")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"model.{key}: '{path}' is no intact file of tensors: {error}") from error
    content = load_torch_file(path, key=key)
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.{key}: '{path}' has no weights under its key 'model'")
    return state


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str,
    may_miss: str = NOTHING,
    ignored: str = NOTHING,
) -> LoadReport:
    """Load a state dict and account for every weight.

    Args:
        model: changed in place.
        state: the file's weights.
        source: its name, for messages.
        may_miss: regular expression of trainable weights that the file may lack.
        ignored: regular expression of weights in the file that are left there.

    Raises:
        UserError: a weight is missing, unknown or of another shape; the model is unchanged then.
    """
    own = model.state_dict()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = {name for name in state if re.match(ignored, name)}
    brought = state.keys() - unused
    missing = own.keys() - brought
    new = {name for name in missing & trainable if re.match(may_miss, name)}
    loaded = own.keys() & brought
    _check(
        f"'{source}' doesn't fit {type(model).__name__}",
        {
            "missing": (missing & trainable) - new,
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
    """Raise a UserError that lists the problems by kind, if there are any."""
    listed = [f"{kind}: {_listing(sorted(names))}" for kind, names in problems.items() if names]
    if listed:
        raise UserError(f"{what}; {'; '.join(listed)}")


def is_blip2(state: dict[str, Tensor]) -> bool:
    """Whether a file's weights are BLIP-2's, without a fusion."""
    return not _any(FUSION, state)


def _any(pattern: str, state: dict[str, Tensor]) -> bool:
    return any(re.match(pattern, name) for name in state)


def _listing(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
