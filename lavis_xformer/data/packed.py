"""Annotations by the million: made on access, or packed into memory that the loader's worker processes share."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class LazyRows(Sequence[Any]):
    """A sequence of annotations that are made on access."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        """Hold ``length`` rows, row ``i`` being ``make(i)``."""
        self.length, self.make = length, make

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.length

    def __getitem__(self, index: Any) -> Any:
        """Make one row, or a list of them for a slice.

        Raises:
            IndexError: there is no such row.
        """
        rows = range(self.length)[index]
        return self.make(rows) if isinstance(rows, int) else [self.make(row) for row in rows]


class PackedRows(LazyRows):
    """Rows of a dataset as one block of bytes, each unpacked on access.

    Reading a list of dicts updates reference counts in place, so a forked worker ends up copying every page that it
    reads: with many workers, 14 M rows outgrow a machine within days. This block has no such counts, and takes less
    than half as much memory. Changing a returned row does not change the block.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        """Pack rows of plain values."""
        self._block = bytearray()
        self._ends = array("q")
        for row in rows:
            self._block += pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
            self._ends.append(len(self._block))
        super().__init__(len(self._ends), self._row)

    def _row(self, place: int) -> Any:
        start = self._ends[place - 1] if place else 0
        return pickle.loads(memoryview(self._block)[start : self._ends[place]])  # packed above, not from a file
