"""Publishing a folder or a file so that a reader sees all of it or none of it.

A folder is built beside its final place as `<name>.tmp-<id>`; its files are synced to disk, then
`manifest.json` (size and SHA-256 of every file) is written last, then the folder is renamed into place. A
crash at any moment leaves either the old state or the new one, and what a crash leaves behind can be told by
its name.

This sits below `wmtp.storage` because checkpoints commit through it; `wmtp.storage.atomic` is its public
face.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from wmtp.exceptions import UserInputError

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA = 1
STAGING_PATTERN = re.compile(r"^(?P<name>.+)\.(?P<kind>tmp|replaced)-[0-9a-f]{32}$")

# A manifest holds about 150 bytes a file; one above this size was not written by this module.
MAX_MANIFEST_BYTES = 64 * 2**20
_HASH_CHUNK_BYTES = 4 * 2**20


@contextmanager
def publish_directory(
    final: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None, replace: bool = False
) -> Iterator[Path]:
    """Yield an empty staging folder; when the block ends without an error it becomes `final` in one rename.

    Args:
        final: the folder to publish; its parent is created where absent.
        extra: JSON values to put into the manifest beside `schema` and `files`.
        replace: allow `final` to exist. The old folder is moved aside to `<name>.replaced-<id>` first and
            deleted after the new one stands, so that one of the two is always whole.

    Raises:
        UserInputError: `final` exists and `replace` is false.
    """
    final = Path(os.path.abspath(final))
    if final.exists() and not replace:
        raise UserInputError(
            f"{final} exists already.",
            remedy="Choose another name, or remove the folder if it is not needed.",
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        yield staging
        _write_manifest(staging, extra or {})
        rename_into_place(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def discard_directory(path: Path) -> None:
    """Delete a published folder so that a crash on the way leaves a staging name, not a folder with holes."""
    doomed = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part; parents are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        write_synced(staging, content)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON (sorted keys, indented, UTF-8) in one step; see `write_bytes_atomic`."""
    write_bytes_atomic(path, _json_bytes(value))


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a published folder's manifest and check that it is exactly what was written.

    Raises:
        ValueError: there is none, or a byte of it changed; the message says which.
    """
    return parse_manifest(read_manifest_bytes(directory))


def read_manifest_bytes(directory: str | os.PathLike[str]) -> bytes:
    """Read a published folder's manifest as it is; a ValueError where there is none of a sensible size."""
    path = Path(directory) / MANIFEST_NAME
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{MANIFEST_NAME} is not a plain file of a sensible size")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{MANIFEST_NAME} cannot be read ({error.strerror}): the save was not finished"
        ) from error


def parse_manifest(raw: bytes) -> dict[str, Any]:
    """Check that a manifest is exactly what was written; its content without its own digest.

    Raises:
        ValueError: a byte of it changed, or another version wrote it; the message says which.
    """
    try:
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        # Compared as bytes, so that a change in blanks or in the order of keys is found too.
        is_whole = _digested(body) == raw
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST_NAME} is damaged: {error}") from error
    if not is_whole:
        raise ValueError(f"{MANIFEST_NAME} is damaged: its own digest does not match")
    if body.get("schema") != MANIFEST_SCHEMA:
        raise ValueError(
            f"{MANIFEST_NAME} has schema {body.get('schema')!r}, this version reads {MANIFEST_SCHEMA}"
        )
    if not _lists_files(body.get("files")):
        raise ValueError(f"{MANIFEST_NAME} lists no files, or lists them in a form that is not understood")
    return body


def verify_manifest(directory: str | os.PathLike[str], *, hashes: bool = True) -> list[str]:
    """List what is wrong with a published folder; an empty list means that every file is as it was written.

    Args:
        directory: the published folder.
        hashes: also read every file and compare its SHA-256; without it only names, kinds and sizes are
            checked.
    """
    directory = Path(directory)
    try:
        files = read_manifest(directory)["files"]
    except ValueError as error:
        return [str(error)]
    problems = []
    for name, entry in files.items():
        problem = _file_problem(directory, name, entry, hashes=hashes)
        if problem is not None:
            problems.append(f"{name}: {problem}")
    return problems


def _file_problem(directory: Path, name: str, entry: Mapping[str, Any], *, hashes: bool) -> str | None:
    if not is_inside(name):
        return "the name points out of the folder"
    path = directory / name
    try:
        status = path.lstat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    # A link, or a file reached through a linked folder, could be changed from outside after the check.
    if not stat.S_ISREG(status.st_mode) or path.resolve() != directory.resolve() / name:
        return "is not a plain file in the folder"
    if status.st_size != entry["size"]:
        return f"has {status.st_size} bytes, the manifest says {entry['size']}"
    if not hashes:
        return None
    try:
        digest = file_sha256(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == entry["sha256"] else "its SHA-256 differs from the manifest's"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content as lower-case hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _lists_files(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def is_inside(name: str) -> bool:
    """Whether a file name of a manifest stays within its folder."""
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name


def _write_manifest(staging: Path, extra: Mapping[str, Any]) -> None:
    files: dict[str, dict[str, Any]] = {}
    folders = [staging]
    for path in sorted(staging.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"only plain files can be published, {path} is not one")
        if path.is_dir():
            folders.append(path)
            continue
        _sync_file(path)
        name = path.relative_to(staging).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    write_synced(staging / MANIFEST_NAME, manifest_bytes(files, extra))
    for folder in folders:
        sync_folder(folder)


def rename_into_place(staging: Path, final: Path) -> None:
    """Rename a finished folder to its final name; an older one is moved aside first, then deleted."""
    replaced: Path | None = None
    if final.exists():
        replaced = final.with_name(f"{final.name}.replaced-{uuid.uuid4().hex}")
        os.rename(final, replaced)
    try:
        os.rename(staging, final)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    sync_folder(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def manifest_bytes(files: Mapping[str, Mapping[str, Any]], extra: Mapping[str, Any]) -> bytes:
    """A manifest of files (name -> size and sha256) and further JSON values, with a digest of itself."""
    return _digested({**extra, "schema": MANIFEST_SCHEMA, "files": files})


def _digested(body: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_json_bytes(body)).hexdigest()
    return _json_bytes({**body, "sha256": digest})


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    # A rename is durable only once the folder that holds the name is synced.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
