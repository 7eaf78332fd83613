"""Places on this machine: the output folder, which has to do what checkpoints need, and libraries' caches."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path

from wmtp.pipelines.doctor_check import Check, size_text
from wmtp.settings import Config
from wmtp.storage import PathResolver

_NO_SPACE_BYTES = 512 * 2**20
_LOW_SPACE_BYTES = 10 * 2**30
_COUNT_S = 2.0


def check_output(config: Config) -> Iterator[Check]:
    """Whether results can be kept where they go: writing, renaming, syncing and locking; space.

    What is created for it is removed again, folders included.
    """
    kind, _ = PathResolver().resolve(config.paths.output)
    if kind in ("local", "hub"):
        places = {"paths.output": config.paths.output}
    else:
        yield Check("output", "paths.output", "works", f"{config.paths.output} is remote, see {kind}")
        places = {"paths.work": config.paths.work}
    if config.s3.fallback_dir is not None:
        places["s3.fallback_dir"] = config.s3.fallback_dir
    for key, place in places.items():
        yield from _check_folder(key, Path(place.removeprefix("file://")).expanduser().absolute())


def _check_folder(key: str, folder: Path) -> Iterator[Check]:
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    made = [path for path in (folder, *folder.parents) if path not in (existing, *existing.parents)]
    yield _check_space(key, existing)
    probe = folder / f".wmtp-doctor-{uuid.uuid4().hex}"
    try:
        probe.mkdir(parents=True)
    except OSError as error:
        where = "" if existing == folder else f" (made below {existing})"
        detail = f"{folder} cannot be written{where}: {error.strerror}"
        yield Check("output", key, "broken", detail, _remedy(key))
        return
    try:
        problems = list(_try_files(key, probe))
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for path in made:
            # Somebody may have put a file there in the meantime.
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    if problems:
        yield from problems
        return
    state = "" if existing == folder else ", and will be made by the first run"
    detail = f"{folder} can be written{state}; renaming, syncing and locking work"
    yield Check("output", key, "works", detail)


def check_caches() -> Iterator[Check]:
    """Caches that libraries keep by themselves: where they are, and what they take."""
    for name, (variable, path) in library_caches().items():
        if path is None:
            continue
        size = _size_of(path)
        state = "not there yet" if size is None else size
        writable = _nearest(path)
        if os.access(writable, os.W_OK):
            yield Check("caches", name, "works", f"{path}: {state} (moved with {variable})")
        else:
            detail = f"{path}: {state}, and it cannot be written"
            remedy = f"set {variable} to a folder that can be written, if a run asks for it"
            yield Check("caches", name, "warning", detail, remedy)
    old = Path(".cache")
    if old.is_dir() and not old.is_symlink():
        detail = f"{old.absolute()}: {_size_of(old)}; WMTP has no cache folder any more"
        yield Check(
            "caches", "older WMTP", "warning", detail, "look at it: wmtp migrate --cache .cache --dry-run"
        )


def library_caches() -> dict[str, tuple[str, Path | None]]:
    """Libraries that insist on a cache of their own: the variable that moves it, and where it is now."""
    from huggingface_hub import constants

    home = Path.home()
    general = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    inductor = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    hub = Path(constants.HF_HUB_CACHE)
    hf_home = Path(os.environ.get("HF_HOME", general / "huggingface"))
    datasets = Path(os.environ.get("HF_DATASETS_CACHE", hf_home / "datasets"))
    return {
        "models of the hub": ("HF_HOME", hub),
        "data sets of the hub": ("HF_DATASETS_CACHE", datasets),
        "torch.compile": ("TORCHINDUCTOR_CACHE_DIR", _from("TORCHINDUCTOR_CACHE_DIR", inductor)),
        "triton": ("TRITON_CACHE_DIR", _from("TRITON_CACHE_DIR", home / ".triton" / "cache")),
        "CUDA kernels": ("CUDA_CACHE_PATH", _from("CUDA_CACHE_PATH", home / ".nv" / "ComputeCache")),
        "matplotlib": ("MPLCONFIGDIR", _from("MPLCONFIGDIR", general / "matplotlib")),
    }


def _remedy(key: str) -> str:
    other = ", or to s3://bucket/prefix" if key == "paths.output" else ""
    return f"set {key} to a folder on a local disk{other}"


def _from(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default)


def _user() -> str:
    # A container can run under a user number that has no name.
    try:
        return getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _check_space(key: str, path: Path) -> Check:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Check("output", f"{key} (space)", "broken", f"{path}: {error.strerror}", _remedy(key))
    detail = f"{size_text(usage.free)} free at {path}{_file_system(path)}"
    remedy = "free space, or choose another disk: a checkpoint of 7B parameters takes about 80 GiB"
    if usage.free < _NO_SPACE_BYTES:
        return Check("output", f"{key} (space)", "broken", detail, remedy)
    if usage.free < _LOW_SPACE_BYTES:
        return Check("output", f"{key} (space)", "warning", detail, remedy)
    return Check("output", f"{key} (space)", "works", detail)


def _file_system(path: Path) -> str:
    """The kind of file system, for Linux."""
    if sys.platform != "linux":
        return ""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, name, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if path.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, name
    return f" ({kind})"


def _try_files(key: str, probe: Path) -> Iterator[Check]:
    """Do what a checkpoint does: write and sync, rename over another, sync the folder, lock."""
    first, second = probe / "first", probe / "second"
    step = "writing and syncing a file"
    try:
        for path in (first, second):
            with path.open("wb") as file:
                file.write(path.name.encode())
                file.flush()
                os.fsync(file.fileno())
        step = "renaming a file over another"
        os.replace(first, second)
        if second.read_bytes() != b"first" or first.exists():
            raise OSError(errno.EIO, "the file is not the renamed one")
        step = "renaming a folder"
        (probe / "folder.tmp").mkdir()
        os.rename(probe / "folder.tmp", probe / "folder")
        step = "syncing a folder"
        descriptor = os.open(probe, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        step = "locking a file"
        yield from _try_lock(key, probe / "lock")
    except OSError as error:
        detail = f"{step} fails there: {error.strerror}"
        yield Check("output", key, "broken", detail, f"checkpoints need it; {_remedy(key)}")


def _try_lock(key: str, path: Path) -> Iterator[Check]:
    """A lock that is held must be refused to the next who asks, or two runs could share a folder."""
    with path.open("w") as held, path.open("w") as other:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    detail = "a lock is given to two at once there, so that two runs would not see each other"
    yield Check("output", key, "broken", detail, _remedy(key))


def _size_of(path: Path) -> str | None:
    """What a folder takes, counted for a short time; None where there is none."""
    if not path.is_dir():
        return None
    deadline = time.monotonic() + _COUNT_S
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            # Files come and go in a cache.
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
        if time.monotonic() > deadline:
            return f"at least {size_text(total)}"
    return size_text(total)


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
