"""Where things are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavis_xformer import paths
from lavis_xformer.errors import UserError


def test_cache_folder_follows_its_variable_then_the_user(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("LAVIS_XFORMER_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("LAVIS_XFORMER_CACHE")
    assert paths.cache_folder() == tmp_path / "xdg" / "lavis-xformer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_folder() == tmp_path / ".cache" / "lavis-xformer"
    assert not paths.cache_folder().exists()


def test_config_paths_are_absolute_as_lavis_wants_them():
    assert Path(paths.config_path("models/x.yaml")).is_absolute()
    assert paths.shipped_folder("configs").is_dir()


def test_a_project_is_found_here_first_and_shipped_ones_from_anywhere(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    assert paths.project_path("mine.yaml") == Path("mine.yaml")
    shipped = next(paths.shipped_folder("projects").rglob("*.yaml"))
    relative = str(shipped.relative_to(paths.shipped_folder("projects").parent))
    assert paths.project_path(relative) == shipped


@pytest.mark.parametrize("name", ["projects/xformer/nothing.yaml", "../setup.py", "configs/models", ""])
def test_a_missing_project_is_named_with_those_that_exist(name: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file.*projects/xformer/"):
        paths.project_path(name)


def test_a_mistyped_project_is_told_the_right_one():
    with pytest.raises(UserError, match=r"did you mean 'projects/xformer/pretrain\.yaml'.* others$"):
        paths.project_path("projects/xformer/pretrain.yml")


def test_what_is_no_file_is_said_to_be_there(tmp_path: Path):
    with pytest.raises(UserError, match="is no regular file"):
        paths.project_path(str(tmp_path))


def test_the_page_that_errors_name_is_there():
    assert paths.run_keys_table().read_text(encoding="utf-8").startswith("# ")
