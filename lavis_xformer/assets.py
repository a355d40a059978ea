"""Files that ship with the package: find them by name, and check them before anything reads them.

A reference ``assets://mini/clip`` in a YAML stands for a folder of weights beside this module, wherever the package
is installed. ``SHA256SUMS.json`` of its set lists every file that is read; one that is missing or has changed
is refused, because a result computed with it could not be repeated.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from lavis_xformer.errors import UserError, nearest
from lavis_xformer.files import sha256

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
        return Path(ref)
    group, _, part = ref.removeprefix(SCHEME).partition("/")
    _verify(root / group, part)
    return root / group / part


def write_sums(folder: Path) -> dict[str, str]:
    """Record the checksum of every file of every part, model cards and hidden folders left out.

    Returns:
        ``{"clip/model.safetensors": "9f..."}``, as written to ``SHA256SUMS.json``.
    """
    sums = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.glob("*/*"))
        if path.is_file() and path.suffix != ".md" and not path.parent.name.startswith(".")
    }
    (folder / SUMS).write_text(json.dumps(sums, indent=2) + "\n")
    return sums


@functools.cache
def _verify(folder: Path, part: str) -> None:
    """Raise unless every recorded file of one part is there, unchanged."""
    record = folder / SUMS
    if not record.is_file():
        raise UserError(f"{SCHEME}{folder.name}: {record} is missing; {_remedy(folder)}")
    sums: dict[str, str] = json.loads(record.read_text())
    names = [name for name in sums if name.startswith(f"{part}/")]
    if not names:
        parts = {name.split("/")[0] for name in sums}
        own = "; one of your own is named by its path (lavis-xformer build-mini --only t5 --out DIR makes DIR/t5)"
        raise UserError(f"{SCHEME}{folder.name}/{part} does not ship; {nearest(part, parts)}{own}")
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {_remedy(folder)}")
        if sha256(path) != sums[name]:
            raise UserError(f"{path} is not the file that {SUMS} names; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"reinstall the package, or rebuild with: lavis-xformer build-mini --out {folder}"
