"""Two processes that end in order, again and again: gloo's threads were seen to abort a process, or to hold it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest

RUNS = 50
TRAINING = """
import torch
from torch.nn.parallel import DistributedDataParallel
from lavis_xformer import launch
from lavis_xformer.distributed import collect, gather

with launch.process_group("cpu") as place:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    for _ in range(5):
        gather(model(torch.randn(8, 4))).square().mean().backward()  # collectives within the backward pass
    collect(place.rank)
"""

ONE_AFTER_ANOTHER = """
import faulthandler
import os
import torch
from torch.nn.parallel import DistributedDataParallel
from lavis_xformer import launch
from lavis_xformer.distributed import collect

def train():
    held = [DistributedDataParallel(torch.nn.Linear(4, 4), broadcast_buffers=False, gradient_as_bucket_view=True)]
    held.append(held)  # freed by the collector only
    collect("done")

for port in os.environ["MASTER_PORT"].split():
    os.environ["MASTER_PORT"] = port
    faulthandler.dump_traceback_later(60, exit=True)
    with launch.process_group("cpu"):
        train()
"""


def free_ports(count):
    """Return different free ports, separated by spaces."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return " ".join(str(probe.getsockname()[1]) for probe in probes)


def start(rank, port, script=TRAINING):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **place, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_fifty_of_fifty_end_in_order():
    statuses, said = [], ""
    for _ in range(RUNS):
        port = free_ports(1)
        both = [start(rank, port) for rank in (0, 1)]
        said += "".join(process.communicate(timeout=300)[1] for process in both)
        statuses += [process.returncode for process in both]
    assert statuses == [0] * 2 * RUNS, said[-2000:]


@pytest.mark.slow
def test_no_model_holds_its_process_group_for_ever():
    ports = free_ports(100)
    both = [start(rank, ports, ONE_AFTER_ANOTHER) for rank in (0, 1)]
    said = "".join(process.communicate(timeout=600)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], said[-2000:]
