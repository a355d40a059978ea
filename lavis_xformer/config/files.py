"""The files and folders that a configuration names: missing ones are found before anything is built."""

from __future__ import annotations

from collections.abc import ItemsView
from pathlib import Path
from typing import Any, cast

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path, is_url
from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_xformer.errors import UserError

_PEEK = 256  # characters read of a file to see what it holds


def check_data_files(datasets: DictConfig, user: DictConfig) -> None:
    """Check what LAVIS's own builders will read; this package's builders check theirs.

    A relative path is relative to the current folder if it exists there, otherwise to the cache folder, as in
    LAVIS. An annotation file that exists needs no ``url`` here; LAVIS requires one, so it is set to the path.

    Args:
        datasets: the merged section ``datasets``; changed in place.
        user: the same section as the user wrote it, without defaults.

    Raises:
        UserError: a file or folder is missing and LAVIS cannot fetch it.
    """
    for name, dataset in cast("ItemsView[str, DictConfig]", datasets.items()):
        info = dataset.get("build_info")
        builder = registry.get_builder_class(name)
        if info is None or not builder.__module__.startswith("lavis.datasets."):
            continue
        for split, annotation in (info.get("annotations") or {}).items():
            own = OmegaConf.select(user, f"{name}.build_info.annotations.{split}") or {}
            key = f"datasets.{name}.build_info.annotations.{split}"
            _check_annotation(key, annotation, "storage" in own and "url" not in own)
            if dataset.get("data_type", "images") == "images":
                _refuse_object(key, annotation.storage[0])
        kind = dataset.get("data_type", "images")
        media = info.get(kind)
        if media and media.get("storage") is not None:
            given, media.storage = media.storage, _locate(media.storage)
            if not Path(media.storage).exists():
                wrong = f"there is no folder {_places(given)}"
                raise UserError(f"datasets.{name}.build_info.{kind}.storage: {wrong}")


def _check_annotation(key: str, annotation: DictConfig, local: bool) -> None:
    """Check one split; ``local``: the user says where it is, but not where to download it from."""
    given, urls = _strings(annotation.get("storage")), _strings(annotation.get("url"))
    files = [_locate(path) for path in given]
    if not files:
        raise UserError(f"{key}.storage is missing: the path of the annotation file")
    annotation.storage = files
    annotation.url = urls if len(urls) == len(files) else files  # a list, both before and after the download
    missing = next((path for path, file in zip(given, files, strict=True) if not Path(file).is_file()), None)
    if missing is None:
        return
    if local or len(urls) != len(files):
        raise UserError(
            f"{key}.storage: there is no file {_places(missing)}. Correct the path; or set {key}.url to download it "
            f"from; or set {key} to null to leave out this split"
        )
    for url in urls:
        if not is_url(url) and not Path(url).is_file():
            raise UserError(f"{key}.url: there is no file {url}, and nothing at {key}.storage ({_places(missing)})")


def _refuse_object(key: str, file: str) -> None:
    """Raise a UserError if a JSON file holds an object, such as COCO's own: LAVIS's images come with a list of rows."""
    if not (file.endswith(".json") and Path(file).is_file()):  # else it is to be downloaded
        return
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        if opened.read(_PEEK).lstrip().startswith("{"):
            raise UserError(
                f"{key}.storage: {file} is a JSON object, perhaps a benchmark's own file; LAVIS's datasets read a list "
                "of rows: use the file that LAVIS converted (leave storage out to download it), or the dataset "
                "image_text_json or image_question_json, which read yours"
            )


def check_file(key: str, path: Any) -> None:
    """Raise a UserError that names ``key`` if ``path`` is set and no such file exists; nothing is downloaded."""
    if path and not Path(str(path)).is_file():
        wrong = f"download {path} and give its path" if is_url(str(path)) else f"there is no file {path}"
        raise UserError(f"{key}: {wrong}")


def _locate(path: str) -> str:
    here = Path(path).expanduser()
    return str(here.absolute()) if here.exists() else get_cache_path(path)


def _places(path: str) -> str:
    """A missing path and, if it is relative, where else it was looked for."""
    located = _locate(path)
    return path if located == path else f"{path}, neither here nor as {located}"


def _strings(value: Any) -> list[str]:
    return list(value) if isinstance(value, (list, ListConfig)) else [value] if value else []
