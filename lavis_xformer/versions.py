"""Versions of installed packages, read from their metadata: nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    return {package: found for package in packages if (found := version_of(package)) is not None}
