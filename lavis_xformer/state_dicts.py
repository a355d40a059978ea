"""Which weights a checkpoint holds; loads a state dict into a module, and accounts for every weight."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor, nn

from lavis_xformer.errors import UserError

logger = logging.getLogger(__name__)

LISTED = 5  # names that a message lists before it counts the rest
NOTHING = r"(?!)"  # a regular expression that matches no name


@dataclass(frozen=True)
class LoadReport:
    """Which weights of a model were loaded from a file, which were not, and which of the file's were left unused."""

    loaded: tuple[str, ...] = ()
    missing_built: tuple[str, ...] = ()  #: not in the file; frozen, or from a file of their own
    missing_new: tuple[str, ...] = ()  #: not in the file; these keep their initial values
    unused: tuple[str, ...] = ()  #: in the file, but not needed by this model

    def __str__(self) -> str:
        """Count each kind, and list the weights that keep their initial values."""
        new = f" ({listing(self.missing_new)})" if self.missing_new else ""
        return (
            f"loaded {len(self.loaded)} weights; {len(self.missing_new)} newly initialised{new}; "
            f"{len(self.missing_built)} frozen or from files of their own; {len(self.unused)} of the file's unused"
        )

    def __add__(self, later: LoadReport) -> LoadReport:
        """The report on two files, the later one loaded on top of this one."""
        loaded = {*self.loaded, *later.loaded}
        new = {*self.missing_new, *later.missing_new} - loaded  # train_only may have frozen some of them since
        return LoadReport(
            loaded=tuple(sorted(loaded)),
            missing_built=tuple(name for name in later.missing_built if name not in loaded | new),
            missing_new=tuple(sorted(new)),
            unused=tuple(sorted({*self.unused, *later.unused})),
        )


def trainable_names(model: nn.Module) -> set[str]:
    """Return the names of the tensors that training changes.

    These are parameters that require gradients, under each of their names, and persistent buffers of
    modules that contain such a parameter (running statistics). A frozen tensor is never among them,
    not even under a second name that ties it to another module.
    """
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    saved = model.state_dict().keys()
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters()):
            own = (f"{prefix}.{n}" if prefix else n for n, _ in module.named_buffers(recurse=False))
            names.update(name for name in own if name in saved)
    return names


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the part of ``model.state_dict()`` that training changes."""
    names = trainable_names(model)
    return {name: value for name, value in model.state_dict().items() if name in names}


def weights_told(model: nn.Module) -> str:
    """Say how many weights a model has: ``XFormer: 1.22 M trained, 3.40 M frozen``."""
    trained, frozen = (
        sum(p.numel() for p in model.parameters() if p.requires_grad is wanted) / 1e6 for wanted in (True, False)
    )
    return f"{type(model).__name__}: {trained:.2f} M trained, {frozen:.2f} M frozen"


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    may_miss: str = NOTHING,
    built: str = NOTHING,
    ignored: str = NOTHING,
    held: Sequence[str] = (),
) -> LoadReport:
    """Load a state dict in which frozen weights may be missing.

    Args:
        model: changed in place.
        state: the file's weights.
        source: the file's name, for messages.
        may_miss: regular expression of trainable weights that the file may lack, which are then new.
        built: of those that it may lack because the model was built with them.
        ignored: regular expression of the file's weights that are not loaded, unless they are trainable here.
        held: weights that the file may lack because an earlier file provided them.

    Raises:
        UserError: a weight is missing, unknown or of another shape; the model is then unchanged.
    """
    own = model.state_dict()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = {name for name in state if re.match(ignored, name)} - trainable
    given = state.keys() - unused
    missing = own.keys() - given
    wanted = {name for name in (missing & trainable) - set(held) if not re.match(built, name)}
    new = {name for name in wanted if re.match(may_miss, name)}
    _load(model, {name: state[name] for name in given}, needed=wanted - new, source=f"'{source}'")
    report = LoadReport(
        loaded=tuple(sorted(given)),
        missing_built=tuple(sorted(missing - wanted - set(held))),
        missing_new=tuple(sorted(new)),
        unused=tuple(sorted(unused)),
    )
    logger.info("%s: %s", source, report)
    return report


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict that must hold every weight of the module, frozen or not, and no other.

    Raises:
        UserError: a weight is missing, unknown or of another shape; the module is then unchanged.
    """
    _load(module, state, needed=module.state_dict().keys(), source=source)
    logger.info("loaded %d weights of %s", len(state), source)


def load_trainable(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load what :func:`trainable_state` returned, together with any frozen weights in the state dict.

    Raises:
        UserError: a trainable weight is missing, or a weight is unknown or of another shape; the module is then
            unchanged.
    """
    _load(module, state, needed=trainable_names(module), source=source)


def listing(names: Sequence[str]) -> str:
    """Join the first names, and count the rest."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _load(module: nn.Module, state: Mapping[str, Tensor], *, needed: Set[str], source: str) -> None:
    """Load a state dict with the weights ``needed``, and any others that the module has.

    Raises:
        UserError: a weight is missing, unknown or of another shape; the module is then unchanged, and the log has every
            list in full.
    """
    own = module.state_dict()
    problems = {
        "missing": needed - state.keys(),
        "unknown": state.keys() - own.keys(),
        "of another shape": {
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if state[name].shape != own[name].shape
        },
    }
    what = f"{source} doesn't fit {type(module).__name__}"
    listed = [f"{kind}: {listing(sorted(names))}" for kind, names in problems.items() if names]
    if listed:
        for kind, names in problems.items():
            if len(names) > LISTED:
                logger.error("%s; %s, all %d: %s", what, kind, len(names), ", ".join(sorted(names)))
        raise UserError(f"{what}; {'; '.join(listed)}")
    module.load_state_dict(state, strict=False)  # what is missing may be
