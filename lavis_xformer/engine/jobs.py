"""Run folders: what each run was configured to do, and which one a restart resumes."""

from __future__ import annotations

import datetime
import fcntl
import itertools
import logging
import platform
from collections.abc import Mapping, Set
from pathlib import Path
from typing import IO, Any

from lavis_xformer import distributed, run_folder
from lavis_xformer.distributed import is_main
from lavis_xformer.engine import checkpoint
from lavis_xformer.errors import UserError
from lavis_xformer.files import read_json
from lavis_xformer.nested import nodes
from lavis_xformer.versions import versions_of

LOCK_NAME = ".lock"

# What may differ between a run and its restart: where and how it runs, not what it computes.
_INCIDENTAL = (
    "resume resume_ckpt_path job_id output_dir num_workers device distributed gpu rank world_size dist_url "
    "dist_backend log_freq tensorboard next_command keep_last save_every_steps save_every_minutes loader_timeout "
    "skip_nonfinite on_corrupt wandb batch_size_eval"
)
INCIDENTAL = {f"run.{name}" for name in _INCIDENTAL.split()}
PACKAGES = ("lavis_xformer", "salesforce-lavis", "torch", "transformers", "numpy")

logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine what a run computes."""
    return {"python": platform.python_version(), **versions_of(PACKAGES)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, incidental: Set[str] = INCIDENTAL) -> list[str]:
    """Return ``key: old -> new`` for every key of two configurations that changes the computation."""
    before, after = nodes(old, leaves=True), nodes(new, leaves=True)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in incidental
    ]


def choose(config: Mapping[str, Any], *, job_id: str, resume: str) -> str:
    """Return the name of the run folder, the same on all ranks: the given one, one to resume, or a new one."""
    output_dir = Path(config["run"]["output_dir"])
    if not job_id and resume == "auto" and is_main():
        job_id = newest_matching(output_dir, config) or ""
    return distributed.share(job_id) or new_job_id(output_dir)


def new_job_id(output_dir: Path) -> str:
    """Return the name of a folder that rank 0 creates: the time to the second, plus a number if that is taken."""
    return distributed.share(_new_folder(output_dir) if is_main() else "")


def _new_folder(output_dir: Path) -> str:
    now = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    names = itertools.chain([now], (f"{now}_{number}" for number in itertools.count(2)))
    return next(name for name in names if _is_made(output_dir / name))


def _is_made(folder: Path) -> bool:
    """Create a folder; return False if it exists already, perhaps from another run started in the same second."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError:
        pass  # the runner, which needs the folder, reports why
    return True


def newest_matching(output_dir: Path, config: Mapping[str, Any]) -> str | None:
    """Return the id of the newest run under ``output_dir`` that this configuration can resume.

    Such a run has the same configuration (where it runs and how often it saves may differ), began at the same
    checkpoint, if at any, and has one itself; where none has, one whose checkpoints are damaged.
    """
    broken: str | None = None
    folders = sorted(output_dir.glob(f"*/{run_folder.CONFIG}"), key=lambda path: path.stat().st_mtime_ns)
    for path in reversed(folders):
        try:
            changes = differences(read_json(path), config, incidental=INCIDENTAL - {"run.resume_ckpt_path"})
        except ValueError:
            continue
        if not changes and checkpoint.listed(path.parent):
            return path.parent.name
        if not changes and damaged(path.parent):
            broken = broken or path.parent.name
        if changes:
            told = "; ".join(changes[:3])
            logger.info("%s is a different run: %s (run.job_id=%s resumes it)", path.parent, told, path.parent.name)
    return broken


def check_unused(folder: Path) -> None:
    """Check that a run's folder holds no checkpoints, intact or damaged, of an earlier one.

    Raises:
        UserError: it does.
    """
    if checkpoint.listed(folder):
        raise UserError(
            f"{folder} holds the checkpoints of another run; run.resume=auto resumes it, another run.job_id starts a "
            "new run"
        )
    if names := damaged(folder):
        raise UserError(
            f"{folder} holds only damaged checkpoints ({', '.join(names)}); another run.job_id starts a new run"
        )


def damaged(folder: Path) -> list[str]:
    """Name the checkpoints in a folder that could not be read."""
    return sorted(path.name for path in folder.glob("checkpoint_*.bad"))


def claim(folder: Path) -> IO[str] | None:
    """Lock a run's folder for this training; must be called on all ranks.

    Returns:
        The main process's open file, whose lock holds the folder until that process ends; ``None`` on other ranks.

    Raises:
        UserError: another process is training in it, or nothing can be written there.
    """
    file = _locked(folder) if is_main() else None
    if not distributed.share(file is not None):
        raise UserError(
            f"another process is training in {folder}: wait for it or stop it (run.resume=auto then resumes it), "
            "or give this run its own run.job_id"
        )
    return file


def _locked(folder: Path) -> IO[str] | None:
    try:
        file = (folder / LOCK_NAME).open("w")
    except OSError as error:
        raise UserError(f"run.output_dir: nothing can be written in {folder}: {error.strerror}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process's alone: its workers don't inherit it
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:  # a file system without locks
        logger.warning("%s can't be locked (%s): make sure that no other process trains in it", folder, error)
    return file


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return a finished run's summary, ``None`` for a run that has not finished."""
    path = folder / run_folder.SUMMARY
    return read_json(path) if path.exists() else None
