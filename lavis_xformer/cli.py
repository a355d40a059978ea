"""The `lavis-xformer` command, and how every entry point of this package reports an error.

Subcommands are imported only when they are called, so that ``doctor`` works where nothing else does.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from lavis_xformer import __version__
from lavis_xformer.errors import UserError, first_line, lost_worker, nearest

TRACEBACK_FLAG = "--traceback"
TRACEBACK_VARIABLE = "LAVIS_XFORMER_TRACEBACK"

#: name -> (module whose ``main(argv) -> int`` runs it, one line of help)
COMMANDS = {
    "doctor": ("lavis_xformer.doctor", "check this environment, and a run's YAML, and say how to fix it"),
    "scenes": ("lavis_xformer.data.scenes.sheet", "draw a contact sheet of the synthetic scenes"),
    "validate": ("lavis_xformer.data.validate", "check a JSON, JSONL or CSV of images and texts"),
    "report": ("lavis_xformer.analysis.report", "draw the curves and write the report of a run's folder"),
    "export": ("lavis_xformer.export", "export a checkpoint as a folder: safetensors, config and model card"),
    "build-mini": ("lavis_xformer.mini.build", "train the mini encoders and language model from scratch"),
    "compare": ("lavis_xformer.compare.run", "train and evaluate variants under equal conditions, and compare them"),
    "attend": ("lavis_xformer.analysis.attend", "draw where a model looks in an image, and what supports a text"),
    "diagnose": ("lavis_xformer.analysis.diagnose", "say whether a model uses M, where, and what teaches it to"),
    "probe": ("lavis_xformer.probe.run", "measure what the mini encoders' tokens reveal about scenes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    return run(_dispatch, list(sys.argv[1:] if argv is None else argv))


def usage() -> str:
    """Return the help text: the subcommands and a line on each."""
    lines = [f"  {name:<12}{description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lavis-xformer COMMAND [--help] [...]",
            *lines,
            f"{TRACEBACK_FLAG}, or {TRACEBACK_VARIABLE}=1, shows where an error comes from.",
        ]
    )


def run(command: Callable[[list[str]], int | None], argv: Sequence[str]) -> int:
    """Call ``command(argv)``; a user error becomes one line on stderr and exit status 2.

    ``--traceback`` anywhere in ``argv`` is removed and shows the traceback as well. Errors that a user can't fix
    are raised unchanged.

    Returns:
        What the command returns (None counts as 0), 2 after a user error, 130 after Ctrl-C, 141 if the reader of
        our output has closed the pipe (``| head``).
    """
    arguments = [argument for argument in argv if argument != TRACEBACK_FLAG]
    try:
        return _flushed(command, arguments)
    except KeyboardInterrupt:
        print("lavis-xformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if len(arguments) < len(argv) or os.environ.get(TRACEBACK_VARIABLE, "0") != "0":
            traceback.print_exc()
        print(f"lavis-xformer: error: {message}", file=sys.stderr)
        return 2


def _flushed(command: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """Call a command and flush stdout: here, where a reader that has left is no error, and not at exit."""
    try:
        status = command(arguments) or 0
    except SystemExit:  # of argparse, after its help
        print(end="", flush=True)
        raise
    print(end="", flush=True)
    return status


def explain(error: BaseException) -> str | None:
    """Say in one line what a user can do about ``error``; None if that is not known."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if gone := next(filter(None, map(lost_worker, chain)), None):
        return gone
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {first_line(error)}"
    if any(_is_unreachable(link) for link in chain):
        said = " ".join(str(error).split())
        return (
            f"a download failed: the network or the hub can't be reached ({said[:200]}). Set the key concerned "
            "(model.bert, model.mae_model, model.vit_weights, model.pretrained, annotations.*.storage) to a local path"
        )
    return None


def _reader_left() -> bool:
    """Whether stdout is the pipe that broke; then nothing more is written to it, not even at exit."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # a stdout without a file, as in a notebook
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return left


def _is_unreachable(error: BaseException) -> bool:
    if isinstance(error, BrokenPipeError):  # a ConnectionError too, but of a pipe
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"URLError", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "gaierror"}:
        return True
    return isinstance(error, OSError) and any(
        words in str(error) for words in ("We couldn't connect to", "Can't load", "is not a local folder")
    )


def _dispatch(argv: list[str]) -> int | None:
    if argv[:1] in (["-V"], ["--version"]):
        print(f"lavis_xformer {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}': {nearest(name, COMMANDS)}")
    command: Callable[[list[str]], int | None] = import_module(COMMANDS[name][0]).main
    return command(rest)


if __name__ == "__main__":
    sys.exit(main())
