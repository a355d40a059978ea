"""Process groups from torchrun's or SLURM's environment variables; none for a single process."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lavis_xformer.errors import UserError, first_line

# Rank 0 may download, render or evaluate alone for a long time, but a hang must end eventually.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a process stands among those that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 29500


def placement(environ: Mapping[str, str] = os.environ) -> Placement:
    """Read torchrun's variables, or else those of a SLURM step with several tasks.

    Raises:
        UserError: a required variable is missing, not a number or too large, or SLURM's node list can't be read.
    """
    try:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            place = Placement(
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", 0)),
                address=environ.get("MASTER_ADDR", "localhost"),
                port=int(environ.get("MASTER_PORT", 29500)),
            )
        elif int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
            place = Placement(
                rank=int(environ["SLURM_PROCID"]),
                world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(environ["SLURM_LOCALID"]),
                address=environ.get("MASTER_ADDR") or first_node(nodes),
                port=int(environ.get("MASTER_PORT") or port_of(environ.get("SLURM_JOB_ID", "0"))),
            )
        elif int(environ.get("RANK", 0)) or int(environ.get("WORLD_SIZE", 1)) != 1:
            raise KeyError("WORLD_SIZE" if "RANK" in environ else "RANK")  # there are others
        else:
            place = Placement()
    except KeyError as error:
        raise UserError(f"the variable {error} is missing; start with torchrun or srun") from None
    except UserError:  # which is a ValueError too
        raise
    except ValueError as error:
        raise UserError(f"a variable of torchrun or SLURM is not a number: {error}") from None
    if not 0 <= place.rank < place.world_size:
        raise UserError(
            f"process {place.rank} of {place.world_size} (RANK and WORLD_SIZE): ranks count from 0; start with torchrun"
        )
    return place


def first_node(nodes: str) -> str:
    """Return the first host of a SLURM node list such as ``gpu[03-05,9],login1``."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM's node list {nodes!r} can't be read; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def port_of(job: str) -> int:
    """Return a port that all tasks of a SLURM job share, and two jobs rarely do."""
    digits = re.sub(r"\D", "", job) or "0"
    return 20000 + int(digits) % 20000


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Placement]:
    """Set up the process group for the block: gloo on CPU, plus nccl on GPUs.

    A successful block ends with a barrier and an orderly shutdown. One that fails does not wait for
    the others: the launcher stops them. With ``cuda``, this process's GPU becomes the current one.

    No DistributedDataParallel may be in use after the block: it would be the group's last owner, and freeing gloo's
    threads with it may wait for ever (torch 2.11).
    """
    place = placement()
    if device == "cuda":
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())  # SLURM may show each task only its own
    if place.world_size == 1:
        yield place
        return
    try:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=f"tcp://{place.address}:{place.port}",
            rank=place.rank,
            world_size=place.world_size,
            timeout=TIMEOUT,
        )
    except (dist.DistError, ValueError) as error:
        where = f"MASTER_ADDR {place.address}, MASTER_PORT {place.port}"
        raise UserError(f"{where}: the processes can't meet there: {first_line(error)}") from error
    try:
        yield place
        gc.collect()  # what is left of DistributedDataParallel
        dist.barrier()
    except BaseException:
        _leave_group()
        raise
    dist.destroy_process_group()


def _leave_group() -> None:
    """Stop torch's threads, which may abort an exit; wait only seconds, since a peer may hang in a collective."""
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(timeout=5)


def device_of(wanted: str) -> str:
    """Resolve ``run.device``: ``auto`` is ``cuda`` where there is a GPU, else ``cpu``.

    Raises:
        UserError: ``cuda`` without a GPU, or an unknown device.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"run.device is {wanted!r}; it must be auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise UserError("run.device is 'cuda', but torch finds no GPU; set run.device to auto or cpu")
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"
