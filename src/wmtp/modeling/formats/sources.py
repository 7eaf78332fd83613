"""Where the files of a model are: a local directory or a repository of the hub.

Whatever lies elsewhere joins by implementing `ModelSource`. Readers ask a source for plain file names of one
folder and never build paths from what a file says.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of the HTTP library in use
    CacheNotFound,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from wmtp.exceptions import ModelLoadError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
HEADS_FILE = "mtp_heads.safetensors"
WMTP_FILE = "wmtp.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<subfolder>[\w./-]+))?")
# Far above what any model's description needs, and little enough to read at once.
_MAX_JSON_BYTES = 64 * 2**20
_MAX_JSON_DEPTH = 64

ResultT = TypeVar("ResultT")


class ModelSource(Protocol):
    """The files of one folder, wherever it is. `str(source)` names the folder in messages."""

    def names(self) -> frozenset[str]:
        """Names of the files in the folder: plain names, without those of its subfolders."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file as a seekable binary stream; the caller closes it.

        Raises:
            ModelLoadError: there is no such file, or it cannot be had.
        """
        ...

    def find(self, name: str) -> Path | None:
        """Return where the file is on this machine, brought here if that is how the source works; None if
        there is no such file or it is nowhere on this machine.

        Raises:
            ModelLoadError: it is there and cannot be had.
        """
        ...

    def parent(self) -> ModelSource | None:
        """Return the folder above, or None if there is none."""
        ...

    def subfolders(self) -> list[str]:
        """Names of the folders in the folder, sorted."""
        ...


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A directory; with `only`, a single file of it, which is then all there is."""

    directory: Path
    only: str | None = None

    def names(self) -> frozenset[str]:
        """See `ModelSource`."""
        if self.only is not None:
            return frozenset({self.only})
        return frozenset(entry.name for entry in self.directory.iterdir() if not entry.is_dir())

    def open(self, name: str) -> BinaryIO:
        """See `ModelSource`."""
        path = self.find(name)
        if path is None:
            raise _missing(self, name)
        try:
            return path.open("rb")
        except OSError as error:
            raise ModelLoadError(f"{path} cannot be read: {error}", remedy="check its permissions") from error

    def find(self, name: str) -> Path | None:
        """See `ModelSource`."""
        check_plain_name(self, name)
        path = self.directory / name
        if self.only not in (None, name) or not path.is_file():
            if path.is_symlink() and not path.exists():
                raise ModelLoadError(f"{path} is a link to nothing", remedy="copy the whole model again")
            return None
        _check_inside(self.directory, path)
        return path

    def parent(self) -> LocalSource | None:
        """See `ModelSource`."""
        above = self.directory.absolute().parent
        return None if above == self.directory.absolute() else LocalSource(above)

    def subfolders(self) -> list[str]:
        """See `ModelSource`."""
        if self.only is not None:
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if entry.is_dir())

    def __str__(self) -> str:
        return str(self.directory)


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the hub, or a folder in it, at one commit.

    Files are downloaded, whole, into the hub library's own cache when they are asked for.

    Attributes:
        repo: `org/name`.
        subfolder: the folder, "" for the root.
        commit: the commit all files are of.
        files: paths of all files of the repository.
    """

    repo: str
    subfolder: str
    commit: str
    files: frozenset[str]

    def names(self) -> frozenset[str]:
        """See `ModelSource`."""
        return frozenset(path for path in self._inside() if "/" not in path)

    def open(self, name: str) -> BinaryIO:
        """See `ModelSource`."""
        path = self.find(name)
        if path is None:
            raise _missing(self, name)
        return path.open("rb")

    def find(self, name: str) -> Path | None:
        """See `ModelSource`."""
        check_plain_name(self, name)
        if name not in self.names():
            return None
        path = str(PurePosixPath(self.subfolder) / name)
        return Path(_ask_hub(self.repo, lambda: hf_hub_download(self.repo, path, revision=self.commit)))

    def parent(self) -> HubSource | None:
        """See `ModelSource`."""
        if not self.subfolder:
            return None
        above = PurePosixPath(self.subfolder).parent
        return HubSource(self.repo, "" if above == PurePosixPath() else str(above), self.commit, self.files)

    def subfolders(self) -> list[str]:
        """See `ModelSource`."""
        return sorted({path.partition("/")[0] for path in self._inside() if "/" in path})

    def _inside(self) -> list[str]:
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        return [path.removeprefix(prefix) for path in self.files if path.startswith(prefix)]

    def __str__(self) -> str:
        return f"{self.repo}:{self.subfolder}" if self.subfolder else self.repo


def locate_source(path: str | Path) -> ModelSource:
    """Tell a directory or file on this machine from a hub id.

    Args:
        path: a directory; a file, for models that are one file; or `org/name`, `org/name:subfolder`.

    Raises:
        ModelLoadError: it is none of these, or the hub has no such repository or folder, or refuses it.
    """
    text = str(path)
    local = Path(text).expanduser()
    if local.is_file():
        if local.suffix not in TORCH_SUFFIXES:
            raise ModelLoadError(f"{text} is a file, not a model directory", remedy="give its directory")
        return LocalSource(local.parent, local.name)
    if local.is_dir():
        return LocalSource(local)
    match = None if isinstance(path, Path) else _HUB_ID.fullmatch(text)
    if match is None or ".." in text:
        raise ModelLoadError(
            f"model directory {text} does not exist",
            remedy="give an existing directory, or a hub id such as org/name or org/name:subfolder",
        )
    return _connect(match["repo"], (match["subfolder"] or "").strip("/"))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file on this machine; errors as for `read_source_json`."""
    return read_source_json(LocalSource(file.parent), file.name)


def read_source_json(source: ModelSource, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelLoadError: with the name of the file: it is missing, too large, too deep, or no JSON object.
    """
    with source.open(name) as stream:
        text = stream.read(_MAX_JSON_BYTES + 1)
    try:
        if len(text) > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES // 2**20} MiB")
        value = json.loads(text)
        _check_depth(value)
    except RecursionError as error:
        raise ModelLoadError(
            f"{source}/{name} cannot be read: it is nested too deep", remedy="fetch or save it again"
        ) from error
    except ValueError as error:
        raise ModelLoadError(
            f"{source}/{name} cannot be read: {error}", remedy="fetch or save it again"
        ) from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{source}/{name} must hold a JSON object, it holds {type(value).__name__}")
    return value


def check_plain_name(source: object, name: str) -> None:
    """Refuse a name that leads out of the folder.

    Raises:
        ModelLoadError: `name` is not the plain name of a file.
    """
    if not name or name in (".", "..") or any(character in name for character in "/\\\0"):
        raise ModelLoadError(
            f"{source}: {name!r} is not a plain file name",
            remedy="do not use this model; it points outside its folder",
        )


def _connect(repo: str, subfolder: str) -> HubSource:
    try:
        info = _ask_hub(repo, lambda: HfApi().model_info(repo))
        files = frozenset(entry.rfilename for entry in info.siblings or ())
        source = HubSource(repo, subfolder, str(info.sha), files)
    except _UnreachableHubError as error:
        source = _connect_to_cache(repo, subfolder, error)
    if not source._inside():
        folders = HubSource(repo, "", source.commit, source.files).subfolders()
        raise ModelLoadError(
            f"{repo} on the hub has no folder {subfolder!r}" if subfolder else f"{repo} on the hub is empty",
            remedy=f"its folders are: {_shown(folders)}",
        )
    return source


def _connect_to_cache(repo: str, subfolder: str, problem: _UnreachableHubError) -> HubSource:
    try:
        cached = [
            entry
            for entry in scan_cache_dir(constants.HF_HUB_CACHE).repos
            if (entry.repo_id, entry.repo_type) == (repo, "model")
        ]
    except CacheNotFound:
        cached = []
    revisions = [revision for entry in cached for revision in entry.revisions]
    if not revisions:
        raise problem from problem.__cause__
    newest = max(revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
    logger.warning("the hub cannot be reached; %s is taken from its cache, %s", repo, newest.snapshot_path)
    files = (file.file_path.relative_to(newest.snapshot_path).as_posix() for file in newest.files)
    return HubSource(repo, subfolder, newest.commit_hash, frozenset(files))


class _UnreachableHubError(ModelLoadError):
    """The hub does not answer, so what is cached may be used."""


def _ask_hub(repo: str, question: Callable[[], ResultT]) -> ResultT:
    try:
        return question()
    except GatedRepoError as error:
        raise ModelLoadError(
            f"the hub refuses {repo}: it is behind a licence ({_first_line(error)})",
            remedy="accept the licence on the model's page, and set HF_TOKEN to a token of that account",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{repo} is not a directory here, and the hub has no such repository or keeps it private",
            remedy="check the spelling (a path, or org/name on the hub); for a private one set HF_TOKEN",
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(repo, error) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(
            f"{repo} cannot be read from the hub: {_first_line(error)}", remedy="check the spelling"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ModelLoadError(
                f"the hub refuses {repo}: {_first_line(error)}",
                remedy="set HF_TOKEN to a token that may read it",
            ) from error
        raise _unreachable(repo, error) from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> _UnreachableHubError:
    return _UnreachableHubError(
        f"{repo} is not a directory here, and the hub cannot be asked for it: {_first_line(error)}",
        remedy="check the spelling (a path, or org/name on the hub) and the network",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _missing(source: ModelSource, name: str) -> ModelLoadError:
    return ModelLoadError(f"{source}/{name} is missing", remedy="copy the whole model directory again")


def _shown(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def _check_inside(directory: Path, path: Path) -> None:
    """Refuse a link out of the folder; the hub library's cache, which is made of links, is no such folder."""
    target = path.resolve()
    folder = directory.resolve()
    allowed = [folder]
    if "snapshots" in folder.parts:
        position = len(folder.parts) - 1 - folder.parts[::-1].index("snapshots")
        allowed.append(Path(*folder.parts[:position]) / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelLoadError(
            f"{path} is a link to {target}, which is outside the model's folder",
            remedy="copy the file into the folder if you trust it",
        )


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            item
            for parent in level
            if isinstance(parent, (dict, list))
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} levels deep")
