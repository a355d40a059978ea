"""Checkpoint files: written atomically, and verified before they are used.

A checkpoint is what ``torch.save`` writes: a zip archive in which every record carries a CRC-32, so a
truncated or altered file is detected without a format of our own, and ``torch.load`` reads it anywhere.
Names give the order: ``checkpoint_{epoch}.pth`` after an epoch (LAVIS's name),
``checkpoint_{epoch}_step{n}.pth`` within it, after ``n`` optimiser steps of the whole run.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from lavis_xformer.errors import UserError, first_line
from lavis_xformer.files import flush_folder, replacing, temporary_of
from lavis_xformer.run_folder import BEST

FORMAT = "lavis_xformer/checkpoint/1"
#: transient errors of the machine, a disk or a network
PASSING = frozenset(
    {errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
)
_NAME = re.compile(r"checkpoint_(\d+)(?:_step(\d+))?\.pth")

logger = logging.getLogger(__name__)


class BadCheckpoint(UserError):
    """A file that is not an intact checkpoint; the message says why."""


def name_of(epoch: int, step: int | None = None) -> str:
    """Return the name of a checkpoint in ``epoch`` after ``step`` optimiser steps of the run; ``None``: at its end."""
    return f"checkpoint_{epoch}.pth" if step is None else f"checkpoint_{epoch}_step{step}.pth"


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, newest first; the best one is not among them."""
    found = {path: match for path in folder.glob("checkpoint_*.pth") if (match := _NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: (int(found[path][1]), float(found[path][2] or "inf")), reverse=True)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``; an interrupted or failed write leaves ``path`` as it was.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **content}, file)
    except RuntimeError as error:  # how torch's zip writer reports a full disk
        raise OSError(f"the disk is full or failing ({first_line(error)})") from error


def alias(source: Path, path: Path) -> None:
    """Give the file ``source`` the second name ``path``: a hard link where possible, else a copy."""
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)
    flush_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        BadCheckpoint: it is missing, truncated or altered, or is not a checkpoint.
        UserError: memory, disk or network fail for the moment, which says nothing about the file.
    """
    reason = damage(path)
    if reason:
        raise BadCheckpoint(f"{path} is not a usable checkpoint: {reason}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        _leave_what_passes(path, error)
        raise BadCheckpoint(f"{path} is not a usable checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict) or not {"model", "optimizer", "epoch"} <= content.keys():
        raise BadCheckpoint(f"{path} holds no training state (model, optimizer, epoch)")
    return content


def damage(path: Path) -> str:
    """Say what is wrong with a file without unpickling it; empty if its checksums match.

    Raises:
        UserError: memory, disk or network fail for the moment.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except FileNotFoundError:
        return "there is no such file"
    except Exception as error:  # whatever a wrong byte makes zipfile raise
        _leave_what_passes(path, error)
        return f"truncated or not a checkpoint ({error})"
    return f"the checksum of its record {broken} does not match" if broken else ""


def _leave_what_passes(path: Path, error: Exception) -> None:
    """Raise a UserError if ``error`` is the machine's and not the file's, which must then not be set aside as bad."""
    passing = isinstance(error, MemoryError) or "allocate memory" in str(error)
    if passing or (isinstance(error, OSError) and error.errno in PASSING):
        raise UserError(f"{path} can't be read right now ({first_line(error)}); it is left as it is") from error


def newest(folder: Path) -> Path | None:
    """Return a run folder's newest intact checkpoint, else its best one, or ``None``; call it in one process only.

    Bad files are renamed to ``*.bad``, so that they are never considered again.
    """
    for path in [*listed(folder), *folder.glob(BEST)]:
        try:
            read(path)
        except BadCheckpoint as error:
            logger.warning("%s; trying the previous one", error)
            path.rename(f"{path}.bad")
        else:
            return path
    return None


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and leftovers of killed writes; 0 keeps all checkpoints."""
    for path in listed(folder)[keep:] if keep else []:
        path.unlink(missing_ok=True)
    for path in folder.glob(".checkpoint_*.tmp"):
        path.unlink(missing_ok=True)
