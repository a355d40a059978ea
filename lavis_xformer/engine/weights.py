"""Which weights a checkpoint holds, and how they are restored: nothing missing, nothing unknown."""

from __future__ import annotations

from torch import Tensor, nn

from lavis_xformer.errors import UserError


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


def load_trainable(model: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load what ``trainable_state`` returned into ``model``, together with any frozen weights in ``state``.

    Raises:
        UserError: a trainable weight is missing, a name is unknown, or a shape differs.
    """
    known = model.state_dict()
    missing = sorted(trainable_names(model) - state.keys())
    unknown = sorted(state.keys() - known.keys())
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(known[name].shape)}"
        for name, value in state.items()
        if name in known and value.shape != known[name].shape
    ]
    if missing:
        raise UserError(f"{source} lacks trained weights of this model: {_some(missing)}")
    if unknown:
        raise UserError(f"{source} has weights unknown to this model: {_some(unknown)}; is it from another model?")
    if shapes:
        raise UserError(f"{source} has weights of another shape: {_some(shapes)}")
    model.load_state_dict(state, strict=False)  # anything missing is frozen, as checked above


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
