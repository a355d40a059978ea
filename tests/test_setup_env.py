"""run_scripts/setup_env.sh with stand-ins for Python: which one it takes, and when it installs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("bash", "sh", "cat", "cksum", "dirname", "ls", "ln", "mkdir", "readlink", "rm", "sed", "sleep", "touch")
# Answers what the script asks of a Python; a broken one answers nothing.
PYTHON = """#!/bin/sh
[ "{version}" = broken ] && exit 127
case "$*" in
    *"import sys"*) echo "{version}" ;;
    "-m venv "*) mkdir -p "$3/bin" && ln -s "$0" "$3/bin/python" ;;
    "-m pip "*) sleep "${{PIP_SECONDS:-0}}"; echo "$*" >> "$PIP_LOG"; exit ${{PIP_STATUS:-0}} ;;
esac
"""


class Machine:
    """A folder with a clone's files and a PATH that holds only what the test puts there."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.bin, self.log = folder / "a clone", folder / "the bin", folder / "pip.log"
        self.venv = self.clone / ".venv"
        (self.clone / "run_scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("setup.py", "pyproject.toml", "constraints.txt", "lavis_xformer.pth", "run_scripts/setup_env.sh"):
            shutil.copy(ROOT / name, self.clone / name)
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))

    def add(self, name: str, version: str) -> None:
        (self.bin / name).write_text(PYTHON.format(version=version))
        (self.bin / name).chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.bin), "PIP_LOG": str(self.log), **variables}
        command = f'source "{self.clone}/run_scripts/setup_env.sh"; echo "$PYTHON"; echo "${{PYTHONPATH-unset}}"'
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([shutil.which("bash"), "-c", command], env=environment, **piped)

    def set_up(self, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**variables)
        said = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, *said)

    def installs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_takes_the_first_python_that_runs_and_fits(machine: Machine):
    machine.add("python3.11", "broken")
    machine.add("python3", "3.12")
    machine.add("python", "3.10")
    done = machine.set_up(PYTHONPATH="/elsewhere", VIRTUAL_ENV="/another")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(machine.venv / "bin" / "python"), "unset"]
    assert os.readlink(machine.venv / "bin" / "python") == str(machine.bin / "python")
    assert f"-m pip install -c {machine.clone}/constraints.txt -e {machine.clone}[dev]" in machine.log.read_text()


def test_says_what_it_found_where_nothing_fits(machine: Machine):
    machine.add("python3.11", "broken")
    machine.add("python3", "3.12")
    done = machine.set_up()
    assert done.returncode != 0
    assert f"{machine.bin}/python3.11: does not run" in done.stderr
    assert f"{machine.bin}/python3: Python 3.12" in done.stderr
    assert "tokenizers 0.13" in done.stderr
    assert not machine.venv.exists()


def test_says_so_where_there_is_no_python_at_all(machine: Machine):
    done = machine.set_up()
    assert done.returncode != 0
    assert "no Python at all" in done.stderr


def test_a_second_run_installs_nothing_and_changed_requirements_install_again(machine: Machine):
    machine.add("python3.11", "3.11")
    machine.set_up()
    machine.set_up()
    assert machine.installs() == 1
    (machine.venv / "kept").touch()
    with (machine.clone / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    machine.set_up()
    assert machine.installs() == 2
    assert (machine.venv / "kept").exists()


def test_a_copy_in_place_of_the_link_is_installed_over(machine: Machine):
    machine.add("python3.11", "3.11")
    machine.set_up()
    (machine.venv / "lib" / "python3.11" / "site-packages" / "lavis_xformer").mkdir(parents=True)
    assert machine.set_up().returncode == 0
    assert machine.installs() == 2


def test_an_interrupted_install_starts_afresh(machine: Machine):
    machine.add("python3.11", "3.11")
    assert machine.set_up(PIP_STATUS="1").returncode != 0
    (machine.venv / "half").touch()
    assert machine.set_up().returncode == 0
    assert machine.installs() == 2
    assert not (machine.venv / "half").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="this machine has no flock")
def test_two_setups_at_once_take_turns(machine: Machine):
    machine.add("python3.11", "3.11")
    (machine.bin / "flock").symlink_to(shutil.which("flock"))
    both = [machine.start(PIP_SECONDS="1") for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert machine.installs() == 1


def test_an_environment_whose_python_is_gone_is_made_again(machine: Machine):
    machine.add("python3.10", "3.10")
    machine.set_up()
    (machine.bin / "python3.10").unlink()
    machine.add("python3.11", "3.11")
    assert machine.set_up().returncode == 0
    assert os.readlink(machine.venv / "bin" / "python") == str(machine.bin / "python3.11")


def test_a_users_own_environment_is_left_alone(machine: Machine):
    machine.add("python3.11", "3.11")
    machine.venv.mkdir()
    (machine.venv / "theirs").touch()
    done = machine.set_up()
    assert done.returncode != 0
    assert "did not create it" in done.stderr
    assert (machine.venv / "theirs").exists()
    assert machine.installs() == 0


def test_an_exported_cdpath_leads_nowhere_else(machine: Machine):
    machine.add("python3.11", "3.11")
    environment = {"PATH": str(machine.bin), "HOME": "/", "PIP_LOG": str(machine.log), "CDPATH": f".:{machine.bin}"}
    asked = {"capture_output": True, "text": True, "check": True}
    command = [shutil.which("bash"), "-c", 'source run_scripts/setup_env.sh; echo "$ROOT"']
    assert subprocess.run(command, cwd=machine.clone, env=environment, **asked).stdout == f"{machine.clone}\n"
    said = subprocess.run(
        ["bash", "run_scripts/chaos.sh"], cwd=ROOT, env={**os.environ, "CDPATH": ".:/tmp", "PYTHON": "echo"}, **asked
    ).stdout
    assert f"--cfg-path {ROOT}/projects/xformer/pretrain.yaml --options" in said


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh", "train/one_gpu.sh", "train/several_nodes.sh"])
def test_a_script_may_be_started_through_a_link(machine: Machine, tmp_path: Path, name: str):
    shutil.copytree(ROOT / "run_scripts" / "train", machine.clone / "run_scripts" / "train")
    shutil.copy(ROOT / "run_scripts" / name, machine.clone / "run_scripts" / name)
    (tmp_path / "link").symlink_to(machine.clone / "run_scripts" / name)
    machine.add("python3.11", "3.11")
    environment = {"PATH": str(machine.bin), "PIP_LOG": str(machine.log), "NODES": "2", "HEAD": "here", "GPUS": "1"}
    done = subprocess.run([shutil.which("bash"), tmp_path / "link"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"-m pip install -c {machine.clone}/constraints.txt -e {machine.clone}[dev]" in machine.log.read_text()


@pytest.mark.parametrize("name", ["one_node.sh", "several_nodes.sh"])
def test_a_training_on_all_gpus_of_none_ends_in_one_line(machine: Machine, name: str):
    shutil.copytree(ROOT / "run_scripts" / "train", machine.clone / "run_scripts" / "train")
    machine.add("python3.11", "3.11")
    environment = {"PATH": str(machine.bin), "PIP_LOG": str(machine.log), "NODES": "2", "HEAD": "here", "GPUS": "0"}
    command = [shutil.which("bash"), machine.clone / "run_scripts" / "train" / name, "a.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("No GPU is visible here; GPUS=2 trains with two processes")


def test_chaos_takes_an_interpreter_with_a_space_in_its_path_and_may_be_linked(tmp_path: Path):
    python, link = tmp_path / "a python", tmp_path / "chaos"
    python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    python.chmod(0o755)
    link.symlink_to(ROOT / "run_scripts" / "chaos.sh")
    asked = {"env": {**os.environ, "PYTHON": str(python)}, "capture_output": True, "text": True, "check": True}
    said = subprocess.run(["bash", link], **asked).stdout.split("\0")
    assert shlex.split(said[said.index("--result-cmd") + 1])[:2] == [str(python), "-c"]
    assert said[said.index("--cfg-path") + 1] == f"{ROOT}/projects/xformer/pretrain.yaml"


@pytest.mark.parametrize("script", ["run_scripts/quickstart.sh", "run_scripts/test.sh", ".ci/run"])
def test_scripts_parse_and_can_be_run(script: str):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
