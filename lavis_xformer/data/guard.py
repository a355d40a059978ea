"""Keep one bad sample from ending a run, and say which one it was.

LAVIS's datasets open images deep inside a loader's worker, where a broken file raises an error that
names no file. :class:`GuardedDataset` wraps any map-style dataset, LAVIS's own or ours; :class:`StreamGuard` does the
same for streams of shards.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset

from lavis_xformer.data.packed import PackedRows
from lavis_xformer.data.photos import describe, strict_decoding
from lavis_xformer.errors import UserError

logger = logging.getLogger(__name__)

MANY = 100_000  # from this many annotations on, they are packed
SHOWN = 20  # warnings about bad samples; after that, one for every thousand


class DataFault(UserError):
    """A sample that can't be read, reported in one line, even from inside a loader's worker.

    torch's loader re-raises it with the worker's traceback as its message; only the last line, the
    original message, is kept.
    """

    def __init__(self, message: str) -> None:
        """Keep the last line of the message, without the name of this class."""
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


class GuardedDataset(Dataset):
    """A map-style dataset whose bad samples are named, counted, and skipped or fatal.

    A skipped sample is replaced by the next good one, so that length and order stay the same and a
    run can be reproduced. Wrap evaluation splits with ``on_corrupt="raise"``, or drop results with a
    repeated ``instance_id``: a replacement would count twice.

    Everything else (collater, annotation, txt2img, ...) is the wrapped dataset's.
    """

    def __init__(self, dataset: Any, *, on_corrupt: str = "skip", max_in_a_row: int = 32) -> None:
        """Wrap a dataset.

        Args:
            dataset: any dataset with a length and an index.
            on_corrupt: ``skip`` or ``raise``.
            max_in_a_row: raise on this many bad samples in a row, which are no accident but a dataset
                that vanished or a wrong configuration.
        """
        self.dataset = dataset
        self.on_corrupt = on_corrupt
        self.max_in_a_row = max_in_a_row
        self._noted = 0  # by this process
        # One flag per sample, in memory that the loader's workers share with this process.
        self._bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        """Number of samples, good and bad."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        """Anything else is the wrapped dataset's."""
        # ``dataset`` is not set yet while a worker unpickles this object; ``__getitems__`` would bypass the guard.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        """Return the sample, or the next good one.

        Raises:
            DataFault: the sample is bad and ``on_corrupt`` is ``raise``, or too many in a row are.
            IndexError: there is no such index.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        tries = min(self.max_in_a_row, len(self))
        for step in range(tries):
            position = (index + step) % len(self)
            try:
                with strict_decoding():
                    return self.dataset[position]
            except DataFault:  # an inner guard's decision
                raise
            except Exception as error:  # whatever a broken file or row makes a decoder raise
                fault = _tell(sample_name(self.dataset, position), error)
                if self.on_corrupt == "raise":
                    raise DataFault(f"{fault} (run.on_corrupt=skip goes on without it)") from error
                self._note(position, fault)
        raise DataFault(f"{tries} bad samples in a row, the last one {fault}")

    def corrupt(self) -> list[str]:
        """Name every bad sample met so far, by this process or by a worker of its loaders."""
        return [sample_name(self.dataset, int(i)) for i in self._bad.nonzero().flatten()]

    def _note(self, position: int, fault: str) -> None:
        if not self._bad[position]:
            self._bad[position] = True
            self._noted += 1
            _warn(self._noted, fault)


class StreamGuard:
    """Names and counts what a webdataset pipeline can't read; its methods are handlers for the pipeline's stages."""

    def __init__(self, *, on_corrupt: str = "skip", max_in_a_row: int = 32) -> None:
        """Make a guard for one stream, in this process and the workers of its loader.

        Args:
            on_corrupt: ``skip`` or ``raise``.
            max_in_a_row: raise on this many faults in a row.
        """
        self.on_corrupt = on_corrupt
        self.max_in_a_row = max_in_a_row
        self._present, self._in_a_row, self._noted = "a sample", 0, 0
        handle, name = tempfile.mkstemp(prefix="corrupt_", suffix=".txt")
        os.close(handle)
        self._names = Path(name)  # workers append to it: their only way to tell this process
        self._known: set[str] = set()  # the names in it when this process last looked,
        self._looked = 0  # up to this byte
        weakref.finalize(self, self._names.unlink, missing_ok=True)

    def shard_fault(self, error: Exception) -> bool:
        """Handle an error in reading shards, to which webdataset adds a url or an open file; return True to skip."""
        said, _, file = str(next(iter(error.args), error)).partition(" @ ")
        place = re.search(r"name='([^']+)'", file)
        url = place[1] if place else error.args[-1] if len(error.args) > 1 else None
        said = getattr(error, "strerror", None) or said
        return self._take(url if isinstance(url, str) else self._present, said, error)

    def sample_fault(self, error: Exception) -> bool:
        """Handle an error in decoding or processing the current sample; return True to skip it."""
        said = describe(error if str(error) else error.__context__ or error)  # webdataset's DecodingError is empty
        return self._take(self._present, said, error)

    def remember(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Pass samples through, remembering the last one that names its shard and key as the current sample."""
        for sample in samples:
            if isinstance(sample, dict) and "__url__" in sample:
                self._present = f"{sample['__url__']} ({sample['__key__']})"
            yield sample

    def watch(self, samples: Iterator[Any], *, source: str) -> Iterator[Any]:
        """Pass fully processed samples through.

        Raises:
            DataFault: there were none; reading on would never end.
        """
        empty = True
        while True:
            with strict_decoding():
                try:
                    sample = next(samples)
                except StopIteration:
                    break
            empty, self._in_a_row = False, 0
            yield sample
        if empty:
            raise DataFault(f"no sample can be read from {source}")

    def corrupt(self) -> list[str]:
        """Name what was skipped so far, by this process or by a worker."""
        self._look()
        return sorted(self._known)

    def _look(self) -> None:
        """Read the names that any process has added since the last look."""
        with self._names.open("rb") as file:
            file.seek(self._looked)
            lines = file.read().rpartition(b"\n")[0]
        if lines:
            self._known.update(lines.decode("utf-8").split("\n"))
            self._looked += len(lines) + 1

    def _take(self, name: str, said: str, error: Exception) -> bool:
        if isinstance(error, DataFault):  # raised below, and passed through another stage
            raise DataFault(str(error.args[0])) from error
        name = name.encode("utf-8", "backslashreplace").decode()  # names in a tar file may have any encoding
        self._in_a_row += 1
        if self.on_corrupt == "raise":
            raise DataFault(f"{name}: {said}") from error
        if self._in_a_row >= self.max_in_a_row:
            raise DataFault(f"{self._in_a_row} bad samples in a row, the last one {name}: {said}") from error
        self._look()
        if name not in self._known:
            with self._names.open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            self._noted += 1
            _warn(self._noted, f"{name}: {said}")
        return True


def _warn(number: int, fault: str) -> None:
    """Log a process's first few bad samples, then one in every thousand: of millions of links, many are dead."""
    if number <= SHOWN or number % 1000 == 0:
        logger.warning("skipped a bad sample (%d so far in this process): %s", number, fault)


def guard(dataset: Any, *, on_corrupt: str = "skip") -> Any:
    """Wrap a dataset, or each part of a concatenation, unless it is guarded already or is a stream without an index.

    A dataset that its builder has guarded keeps its own ``on_corrupt``. From :data:`MANY` annotations on, they are
    packed.

    Args:
        dataset: a map-style dataset, or anything else that LAVIS's builders return.
        on_corrupt: ``skip`` or ``raise``.
    """
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, GuardedDataset) or not indexed:
        return dataset
    if isinstance(dataset, ConcatDataset):
        dataset.datasets = [guard(part, on_corrupt=on_corrupt) for part in dataset.datasets]
        return dataset
    if isinstance(rows := getattr(dataset, "annotation", None), list) and len(rows) >= MANY:
        dataset.annotation = PackedRows(rows)
    return GuardedDataset(dataset, on_corrupt=on_corrupt)


def guards_in(dataset: Any) -> list[GuardedDataset]:
    """Find a dataset's guards: its own, and those of what it wraps or joins."""
    inside = getattr(dataset, "__dict__", {})
    parts = [inside.get("dataset"), *inside.get("datasets", [])]
    own = [dataset] if isinstance(dataset, GuardedDataset) else []
    return own + [found for part in parts if part is not None for found in guards_in(part)]


def _tell(name: str, error: Exception) -> str:
    path = name.partition(" (sample ")[0]
    return f"{name}: {describe(error).removeprefix(f'{path}: ')}"


def sample_name(dataset: Any, index: int) -> str:
    """Name a sample by its file and row if the dataset provides them, else by its index."""
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return sample_name(dataset.datasets[part], index - before)
    try:
        image = dataset.annotation[index]["image"]
        path = os.path.join(getattr(dataset, "vis_root", None) or "", image)
    except (AttributeError, LookupError, TypeError):
        return f"sample {index} of {type(dataset).__name__}"
    return f"{path} (sample {index})"
