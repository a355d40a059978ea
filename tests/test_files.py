"""Small files: whole or as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavis_xformer.files import read_json, replacing, sha256, write_json
from lavis_xformer.versions import version_of, versions_of


def test_what_is_read_is_what_was_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"one": 1, "path": tmp_path})
    assert read_json(tmp_path / "a.json") == {"one": 1, "path": str(tmp_path)}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a.json") as file:
            file.write(b"half of it")
            raise RuntimeError("on the way")

    write_json(tmp_path / "a.json", {"one": 1})
    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert read_json(tmp_path / "a.json") == {"one": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_packages_that_are_not_installed_have_no_version() -> None:
    assert version_of("no-such-package") is None
    assert versions_of(["torch", "no-such-package"]).keys() == {"torch"}


def test_sha256_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")
