"""The command and how entry points report errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import urllib.error
from importlib import import_module
from pathlib import Path

import pytest

from lavis_xformer import __version__, cli
from lavis_xformer.conclude import as_called_here, table
from lavis_xformer.errors import UserError
from lavis_xformer.train import arguments


def fail(error: BaseException):
    def command(argv: list[str]) -> int:
        raise error

    return command


def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys):
    assert cli.run(fail(UserError("run.task: there is\n  no task")), []) == 2
    assert capsys.readouterr().err == "lavis-xformer: error: run.task: there is no task\n"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_traceback_can_be_seen(how: str, capsys, monkeypatch):
    if how == "variable":
        monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    assert cli.run(fail(UserError("no")), [cli.TRACEBACK_FLAG] if how == "flag" else []) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_traceback_flag_is_not_handed_on():
    seen: list[str] = []
    assert cli.run(seen.extend, ["--cfg-path", "x", cli.TRACEBACK_FLAG]) == 0
    assert seen == ["--cfg-path", "x"]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(fail(ZeroDivisionError("a bug")), [])


def test_an_unreachable_network_names_what_to_set(capsys):
    error = OSError("wrapped")
    error.__cause__ = urllib.error.URLError("Name or service not known")
    assert cli.run(fail(error), []) == 2
    assert "to a local path" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_failed_download():
    code = "from lavis_xformer import cli; raise SystemExit(cli.run(lambda argv: print('x' * 10**6), []))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    with pytest.raises(BrokenPipeError):  # another pipe than our output: a bug, not the network
        cli.run(fail(BrokenPipeError(32, "Broken pipe")), [])


def test_a_full_disk_and_a_lost_worker_are_one_line(capsys):
    assert cli.run(fail(OSError(errno.ENOSPC, "No space left on device", "/x/log.jsonl")), []) == 2
    assert "error: the disk is full: [Errno 28] No space left on device: '/x/log.jsonl'" in capsys.readouterr().err
    assert cli.run(fail(RuntimeError("DataLoader timed out after 5 seconds")), []) == 2
    assert "a data worker died or timed out" in capsys.readouterr().err


def test_ctrl_c_is_status_130(capsys):
    assert cli.run(fail(KeyboardInterrupt()), []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_status_is_that_of_the_command():
    assert cli.run(lambda argv: 1, []) == 1
    assert cli.run(lambda argv: None, []) == 0


def test_help_version_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert cli.main([]) == cli.main([cli.TRACEBACK_FLAG]) == 2
    assert cli.main([cli.TRACEBACK_FLAG, "--help"]) == 0
    assert cli.main(["docter"]) == 2
    assert "did you mean 'doctor'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_shows_its_help(name: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        import_module(cli.COMMANDS[name][0]).main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: lavis-xformer {name} " in said
    assert f"lavis-xformer {name}" in said.split("\n\n")[1], "what it does"
    for unwanted in ("`", ":func:", "::", "B: batch"):
        assert unwanted not in said
    assert all(len(line) <= 80 or line.startswith(" ") for line in said.splitlines()), "only examples are longer"


def test_options_may_come_in_several_parts():
    words = "--cfg-path a.yaml --options run.seed=1 run.max_epoch=2 --options run.amp=bf16".split()
    assert arguments(words, None).options == ["run.seed=1", "run.max_epoch=2", "run.amp=bf16"]


def test_the_next_command_names_the_interpreter_that_python_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "a venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)  # as an environment has it: the same file, another prefix
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    assert as_called_here("python -m lavis.train") == "'a venv/bin/python' -m lavis.train"
    assert as_called_here("lavis-xformer compare a.yaml") == "'a venv/bin/lavis-xformer' compare a.yaml"
    assert as_called_here("torchrun -m lavis.train") == "torchrun -m lavis.train"
    monkeypatch.setenv("PATH", str(python.parent))
    assert as_called_here("python -m lavis.train") == "python -m lavis.train"


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("compare x.yaml --jobs 0", "argument --jobs: 0 is less than 1"),
        ("attend --scenes 0", "argument --scenes: 0 is less than 1"),
        ("scenes --seed -1", "argument --seed: -1 is less than 0"),
        ("validate x.json --show -1", "argument --show: -1 is less than 0"),
        ("probe --held-out 0", "argument --held-out: 0 is less than 1"),
        ("build-mini --out x --seed -1", "argument --seed: -1 is less than 0"),
        ("diagnose --cfg-path x.yaml --batches many", "argument --batches: invalid int value: 'many'"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(given: str, wrong: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(given.split())
    assert stopped.value.code == 2
    assert wrong in capsys.readouterr().err


def test_the_package_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "lavis_xformer", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"lavis_xformer {__version__}\n")


def test_a_tables_columns_are_as_wide_as_its_names():
    class Task:
        @staticmethod
        def table(figures: dict[str, float]) -> list[tuple[str, str, str]]:
            return [
                ("protocol paper, a heading of any length", "", "majority"),
                *((n, "50.0", "25.0") for n in figures),
            ]

    long = "accuracy of a subset with a long name %"
    *_, first, last = table(Task(), {"all": 0, long: 0}).splitlines()
    assert len(first) == len(last)
    assert last.split()[-2:] == ["50.0", "25.0"]
    assert table(object(), {}) == ""


def run_unread(*command):
    """Run Python with a stdout that nobody reads."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *command], stdout=writer, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(writer)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("asked", [["--version"], ["--help"], ["scenes", "--help"]])
def test_a_reader_that_has_left_before_the_first_line_is_none_either(asked):
    assert run_unread("-m", "lavis_xformer", *asked) == (141, "")


def test_an_error_is_told_though_nobody_reads_the_rest():
    code = "from lavis_xformer import cli; print(1); raise SystemExit(cli.main(['nothing']))"
    status, said = run_unread("-c", code)
    assert "lavis-xformer: error: unknown command 'nothing'" in said
    assert status != 141


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["--version"]) == 0


def test_help_fits_the_narrowest_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "usage" in capsys.readouterr().out
