"""Where a process stands, from torchrun's and SLURM's variables."""

from __future__ import annotations

import socket

import pytest

from lavis_xformer import launch
from lavis_xformer.errors import UserError
from lavis_xformer.launch import Placement, device_of, first_node, placement


def test_one_process_needs_no_variables():
    assert placement({}) == Placement(rank=0, world_size=1, local_rank=0)


def test_a_batch_script_without_srun_is_one_process():
    assert placement({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "5"}).world_size == 1


def test_torchrun_goes_before_slurm():
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    assert placement({**variables, "SLURM_STEP_NUM_TASKS": "9"}) == Placement(
        rank=3, world_size=4, local_rank=1, address="h", port=7
    )


def test_a_slurm_step_meets_on_its_first_node():
    variables = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123"}
    place = placement({**variables, "SLURM_STEP_NODELIST": "gpu[03-04]"})
    assert (place.rank, place.world_size, place.local_rank, place.address) == (5, 8, 1, "gpu03")
    assert place.port == placement({**variables, "SLURM_STEP_NODELIST": "gpu[03-04]"}).port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("n[7,9-12],x", "n7"), ("r1-n[007-010]-ib", "r1-n007-ib")],
)
def test_node_lists(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("variables", [{"SLURM_STEP_NUM_TASKS": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_variables_that_make_no_sense_are_named(variables):
    with pytest.raises(UserError, match="variable"):
        placement(variables)


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="auto, cpu or cuda"):
        device_of("tpu")


def test_a_task_that_sees_its_own_gpu_alone_takes_it(monkeypatch):
    chosen = []
    monkeypatch.setattr(launch, "placement", lambda: Placement(local_rank=3))
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch.torch.cuda, "set_device", chosen.append)
    with launch.process_group("cuda"):
        assert chosen == [0]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "^the variable 'WORLD_SIZE' is missing; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "^the variable 'RANK' is missing; start with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"^process 2 of 2 \(RANK and WORLD_SIZE\): ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "^process 0 of 0"),
    ],
)
def test_a_process_that_would_train_alone_by_mistake_is_refused(variables, message):
    with pytest.raises(UserError, match=message):
        placement(variables)


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_process_that_is_alone_may_be_told_so(variables):
    assert placement(variables).world_size == 1


def test_one_variable_of_torchrun_beside_those_of_slurm_is_none():
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "n1"}
    assert placement({**step, "WORLD_SIZE": "4"}).rank == 3
    alone = placement({**step, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"})
    assert (alone.world_size, alone.local_rank) == (1, 2)


@pytest.mark.parametrize("port", ["taken", 99999])
def test_processes_that_cannot_meet_are_told_where(port, monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1] if port == "taken" else port
        place = Placement(rank=0, world_size=2, address="localhost", port=port)
        monkeypatch.setattr(launch, "placement", lambda: place)
        with (
            pytest.raises(UserError, match=f"^MASTER_ADDR localhost, MASTER_PORT {port}: the processes can't meet"),
            launch.process_group("cpu"),
        ):
            pass


def test_a_cpu_may_be_chosen_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    assert [device_of(wanted) for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_every_job_has_a_port_that_exists():
    assert all(1024 < launch.port_of(job) < 2**16 for job in ("0", "123", "4000000", "77_3"))
