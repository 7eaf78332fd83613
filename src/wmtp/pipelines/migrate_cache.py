"""Removing the cache folder of the older layout, and nothing that is not one.

A folder is removed only when it is none of the places that matter (home, the working folder, configured
models, data and results), holds nothing that a cache did not hold, and no link or mount leads out of it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wmtp.exceptions import UserInputError
from wmtp.settings import Config
from wmtp.storage import PathResolver

_KINDS = {
    "weights": (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf"),
    "data": (".jsonl", ".parquet", ".arrow", ".csv", ".gz", ".zst", ".zip", ".tar"),
    "pickles": (".pkl", ".pickle", ".npy", ".npz"),
    "descriptions and tokenizers": (".json", ".model", ".txt", ".tiktoken", ".vocab"),
    "locks and unfinished downloads": (".lock", ".incomplete", ".tmp", ".metadata"),
}
_OTHER = "other"
# What people make, and what runs leave: neither was ever kept in a cache.
_WORK_SUFFIXES = (".ipynb", ".tex", ".docx", ".xlsx", ".pptx", ".pdf", ".c", ".cpp", ".rs", ".go", ".sh")
_WORK_NAMES = (".git", ".hg", ".svn", "mlflow.db", "mlruns", "pyproject.toml", "final_model.pt")
_STEP = "step-"
# Shared with other programs, whatever the folder's name suggests.
_SHARED = (".cache", ".config", ".local", ".ssh", ".aws", ".triton", ".nv")
_MAX_LISTED = 3


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """A folder that may be removed.

    Attributes:
        path: resolved.
        num_files: in it and below.
        num_bytes: they take.
        kinds: kind of content -> (files, bytes), largest first.
    """

    path: Path
    num_files: int
    num_bytes: int
    kinds: dict[str, tuple[int, int]]


def inspect_cache(
    folder: Path, *, is_configured: bool, configs: Iterable[Config] = (), keep: Iterable[Path] = ()
) -> CacheFolder:
    """Look at a folder and refuse it if it is no cache; nothing is changed.

    Args:
        folder: to be removed.
        is_configured: an old config names it as the cache; otherwise its own name must say so.
        configs: whose models, data and results must stay.
        keep: further files and folders that must stay.

    Raises:
        UserInputError: it is not there, not a cache, or something that must stay is in it.
    """
    if folder.is_symlink():
        raise _refused(folder, f"it is a link to {folder.resolve()}", "remove the link yourself")
    if not folder.exists():
        raise UserInputError(f"there is no folder {folder}", remedy="nothing has to be removed")
    if not folder.is_dir():
        raise _refused(folder, "it is a file", "give the cache folder")
    path = folder.resolve()
    if not is_configured and "cache" not in path.name.lower():
        raise _refused(folder, "neither its name nor a config says that it is a cache")
    _refuse_places(path, [*_places_of(configs), *(place.resolve() for place in keep)])
    entries = list(_walk(path))
    _refuse_content(path, entries)
    kinds: dict[str, tuple[int, int]] = {}
    for entry, size in entries:
        if not entry.is_dir():
            name = _kind(entry)
            files, used = kinds.get(name, (0, 0))
            kinds[name] = (files + 1, used + size)
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1][1]))
    num_files, num_bytes = (sum(values[index] for values in kinds.values()) for index in (0, 1))
    return CacheFolder(path, num_files, num_bytes, ordered)


def remove_cache(cache: CacheFolder) -> None:
    """Remove a folder that `inspect_cache` let pass, renamed first so that nobody uses half of it.

    Raises:
        UserInputError: it cannot be removed; what is left has the name that the message says.
    """
    moved = cache.path.with_name(f"{cache.path.name}.removing-{uuid.uuid4().hex[:8]}")
    try:
        cache.path.rename(moved)
        shutil.rmtree(moved)
    except OSError as error:
        where = moved if moved.exists() else cache.path
        raise UserInputError(
            f"{where} cannot be removed: {error}", remedy="check its permissions, then remove it yourself"
        ) from error


def _places_of(configs: Iterable[Config]) -> Iterator[Path]:
    for config in configs:
        paths, mlflow = config.paths, config.mlflow
        given = (
            *paths.models.model_dump().values(),
            *paths.datasets.model_dump().values(),
            paths.output,
            paths.work,
            config.s3.fallback_dir,
            mlflow.artifact_location,
            None if mlflow.tracking_uri is None else mlflow.tracking_uri.removeprefix("sqlite:///"),
        )
        for place in filter(None, given):
            kind, resolved = PathResolver().resolve(place)
            if kind in ("local", "hub"):
                yield Path(place if kind == "hub" else resolved).resolve()


def _refuse_places(path: Path, places: Iterable[Path]) -> None:
    home = Path.home().resolve()
    reserved = {home: "your home folder", Path.cwd().resolve(): "the working folder"}
    for place, name in reserved.items():
        if path == place or path in place.parents:
            raise _refused(path, f"it is {name}" if path == place else f"{name} is in it")
    if len(path.parts) <= 2:
        raise _refused(path, "it is a folder of the system")
    if path.parent == home and path.name in _SHARED:
        raise _refused(path, "other programs use it too", "name the folder of WMTP inside it")
    if os.path.ismount(path):
        raise _refused(path, "it is a disk of its own")
    for place in places:
        if path == place or path in place.parents or place in path.parents:
            raise _refused(path, f"{place}, which is in use, and it lie in each other")


def _walk(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield everything in the folder with its size; links are not followed."""
    device = path.lstat().st_dev

    def fail(error: OSError) -> None:
        raise _refused(path, f"{error.filename} cannot be read: {error.strerror}", "check its permissions")

    for folder, folders, files in os.walk(path, followlinks=False, onerror=fail):
        for name in (*folders, *files):
            entry = Path(folder) / name
            status = entry.lstat()
            if status.st_dev != device:
                raise _refused(path, f"{entry} is another disk")
            yield entry, status.st_size


def _refuse_content(path: Path, entries: Iterable[tuple[Path, int]]) -> None:
    links, work = [], []
    for entry, _ in entries:
        if entry.is_symlink() and not entry.resolve().is_relative_to(path):
            links.append(entry)
        is_run = entry.is_dir() and entry.name.startswith(_STEP) and (entry / "manifest.json").exists()
        # Models bring code along, which the hub library keeps in these folders.
        is_code = entry.suffix == ".py" and not {"snapshots", "modules"} & set(entry.parts)
        if entry.name in _WORK_NAMES or entry.suffix in _WORK_SUFFIXES or is_run or is_code:
            work.append(entry)
    if links:
        raise _refused(path, f"links lead out of it: {_listed(path, links)}", "remove the links first")
    if work:
        remedy = "move that away if you want to keep it, or remove the folder yourself"
        raise _refused(path, f"it holds what no cache had: {_listed(path, work)}", remedy)


def _kind(entry: Path) -> str:
    # The hub library names contents by their digest and links to them.
    if entry.parent.name in ("blobs", "refs") or entry.is_symlink():
        return "files of the hub library"
    if entry.name.startswith("value_head"):
        return "trained value heads"
    return next((name for name, suffixes in _KINDS.items() if entry.suffix.lower() in suffixes), _OTHER)


def _listed(path: Path, entries: list[Path]) -> str:
    shown = ", ".join(str(entry.relative_to(path)) for entry in entries[:_MAX_LISTED])
    return shown if len(entries) <= _MAX_LISTED else f"{shown} and {len(entries) - _MAX_LISTED} more"


def _refused(
    path: Path, why: str, remedy: str = "give the cache folder of the older layout"
) -> UserInputError:
    return UserInputError(f"{path} is not removed: {why}", remedy=remedy)
