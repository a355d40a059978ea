"""Annotations by the million, in memory that the loader's worker processes share."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import Any


class PackedRows(Sequence[Any]):
    """Rows of a dataset as one block of bytes, each unpacked when it is asked for.

    Of a list of dicts, a forked worker copies page by page what it reads, since reading counts references in place:
    with many workers, 14 M rows outgrow a machine within days. This block is read without a trace, and takes less than
    half as much.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        """Pack rows of plain values."""
        self._block = bytearray()
        self._ends = array("q")
        for row in rows:
            self._block += pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
            self._ends.append(len(self._block))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or a list of them for a slice; a change of it changes nothing here.

        Raises:
            IndexError: there is no such row.
        """
        places = range(len(self))[index]
        return self._row(places) if isinstance(places, int) else [self._row(place) for place in places]

    def _row(self, place: int) -> Any:
        start = self._ends[place - 1] if place else 0
        return pickle.loads(memoryview(self._block)[start : self._ends[place]])  # its own bytes, of no file
