"""Two processes that end in order, again and again: gloo's threads have been seen to abort a process that was done."""

from __future__ import annotations

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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank, port):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TRAINING], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_fifty_of_fifty_end_in_order():
    statuses, said = [], ""
    for _ in range(RUNS):
        port = free_port()
        both = [start(rank, port) for rank in (0, 1)]
        said += "".join(process.communicate(timeout=300)[1] for process in both)
        statuses += [process.returncode for process in both]
    assert statuses == [0] * 2 * RUNS, said[-2000:]
