"""Shipped files are found by name and refused when they changed."""

from __future__ import annotations

import pytest

from lavis_xformer.assets import ROOT, resolve, write_sums
from lavis_xformer.errors import UserError
from lavis_xformer.files import sha256


@pytest.fixture
def shelf(tmp_path):
    """A root with one set of one part."""
    folder = tmp_path / "tiny" / "clip"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "README.md").write_text("card")
    write_sums(tmp_path / "tiny", ["clip"])
    return tmp_path


def test_reference_names_the_folder(shelf):
    assert resolve("assets://tiny/clip", root=shelf) == shelf / "tiny" / "clip"


def test_any_other_string_is_a_path():
    assert str(resolve("some/where")) == "some/where"


def test_flipped_byte_is_refused(shelf):
    path = shelf / "tiny" / "clip" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors does not match its checksum .*; reinstall the package"):
        resolve("assets://tiny/clip", root=shelf)


def test_a_part_built_beside_it_does_not_make_a_flipped_byte_good(shelf):
    path = shelf / "tiny" / "clip" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (shelf / "tiny" / "mae").mkdir()
    (shelf / "tiny" / "mae" / "config.json").write_text("{}")
    write_sums(shelf / "tiny", ["mae"])
    assert resolve("assets://tiny/mae", root=shelf).is_dir()
    with pytest.raises(UserError, match=r"clip/model.safetensors does not match"):
        resolve("assets://tiny/clip", root=shelf)


def test_missing_file_is_named(shelf):
    (shelf / "tiny" / "clip" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing; reinstall the package"):
        resolve("assets://tiny/clip", root=shelf)


@pytest.mark.parametrize("part", ["clipp", "cli"])
def test_unknown_part_names_the_nearest(shelf, part):
    with pytest.raises(UserError, match="did you mean 'clip'"):
        resolve(f"assets://tiny/{part}", root=shelf)


def test_a_card_may_be_edited(shelf):
    (shelf / "tiny" / "clip" / "README.md").write_text("typo mended")
    resolve("assets://tiny/clip", root=shelf)


@pytest.mark.parametrize("part", ["bert", "clip", "mae", "opt", "stage1", "stage2"])
def test_every_shipped_part_is_whole_and_what_its_card_names(part):
    folder = resolve(f"assets://mini/{part}")
    assert any((folder / name).is_file() for name in ("config.json", "config.yaml"))
    card = (folder / "README.md").read_text()
    for path in folder.iterdir():
        assert path.suffix == ".md" or f"| {path.name} | `{sha256(path)}` |" in card, path.name


def test_shipped_weights_stay_small():
    sizes = {path.parent.name: path.stat().st_size for path in (ROOT / "mini").glob("*/*.safetensors")}
    stages = sum(sizes.pop(name) for name in ("stage1", "stage2"))
    assert 0 < sum(sizes.values()) <= 12_000_000
    assert 0 < stages <= 6_000_000


def test_a_set_that_does_not_ship_is_named():
    with pytest.raises(UserError, match=r"assets://maxi: no such set ships with this package; .* mini"):
        resolve("assets://maxi/mae")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/mae") == tmp_path / "mae"
