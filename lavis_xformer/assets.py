"""Files that ship with the package: find them by name, and check them before anything reads them.

A reference ``assets://mini/clip`` in a YAML stands for a folder of weights beside this module, wherever the package
is installed. ``SHA256SUMS.json`` of its set lists every file that is read; one that is missing or has changed
is rejected, because a result computed with it could not be reproduced.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from lavis_xformer.errors import UserError, nearest
from lavis_xformer.files import read_json, sha256, write_json

SCHEME = "assets://"
ROOT = Path(__file__).parent / "assets"
SUMS = "SHA256SUMS.json"


def resolve(ref: str, *, root: Path = ROOT) -> Path:
    """Turn a reference into a path, its files verified once per process.

    Args:
        ref: ``assets://<set>/<part>``, for example ``assets://mini/clip``; any other string is a path already.
        root: the folder that holds the sets.

    Raises:
        UserError: there is no such set or part, or one of its files is missing or differs from its checksum.
    """
    if not ref.startswith(SCHEME):
        return Path(ref).expanduser()
    group, _, part = ref.removeprefix(SCHEME).partition("/")
    _verify(root / group, part)
    return root / group / part


def write_sums(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """Record the checksums of all files in some parts of a set, except model cards; other parts keep theirs.

    Returns:
        ``{"clip/model.safetensors": "9f..."}``, as written to ``SHA256SUMS.json``.
    """
    renewed, record = set(parts), folder / SUMS
    before = read_json(record) if record.is_file() else {}
    sums = {name: of for name, of in before.items() if name.split("/")[0] not in renewed}
    sums |= {
        path.relative_to(folder).as_posix(): sha256(path)
        for part in renewed
        for path in (folder / part).iterdir()
        if path.is_file() and path.suffix != ".md"
    }
    sums = dict(sorted(sums.items()))
    write_json(record, sums)
    return sums


@functools.cache
def _verify(folder: Path, part: str) -> None:
    """Raise unless every recorded file of one part is there, unchanged."""
    record = folder / SUMS
    if not folder.is_dir():
        sets = [path.name for path in folder.parent.iterdir() if (path / SUMS).is_file()]
        raise UserError(f"{SCHEME}{folder.name}: no such set ships with this package; {nearest(folder.name, sets)}")
    if not record.is_file():
        raise UserError(f"{SCHEME}{folder.name}: {record} is missing; reinstall the package")
    sums: dict[str, str] = read_json(record)
    names = [name for name in sums if name.startswith(f"{part}/")]
    if not names:
        parts = {name.split("/")[0] for name in sums}
        own = "; give your own by its path (lavis-xformer build-mini --only t5 --out DIR makes DIR/t5)"
        raise UserError(f"{SCHEME}{folder.name}/{part} is not shipped; {nearest(part, parts)}{own}")
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; reinstall the package")
        if sha256(path) != sums[name]:
            raise UserError(f"{path} does not match its checksum in {SUMS}; reinstall the package")
