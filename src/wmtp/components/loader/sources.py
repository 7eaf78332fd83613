"""From a model's path to its files, wherever these are."""

from __future__ import annotations

from pathlib import Path

from wmtp.components.loader.builtin import MICRO_LLAMA
from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import CONFIG_FILE, ModelSource, locate_source
from wmtp.settings import Config
from wmtp.storage import PathResolver, create_s3_manager


def open_source(config: Config, model_path: str) -> ModelSource:
    """The files of a model: a directory, a file, a hub id, or an `s3://` folder.

    A run folder that has an export is that export.

    Raises:
        ModelLoadError: it is none of these, or not there.
        StorageError: S3 does not give it.
    """
    where, path = PathResolver().resolve(model_path)
    if where == "s3":
        folder = create_s3_manager(config).folder(path)
        has_export = not folder.names() and "final" in folder.subfolders()
        return folder.subfolder("final") if has_export else folder
    if where not in ("local", "hub"):
        raise ModelLoadError(
            f"models cannot be loaded from {model_path}",
            remedy=f"give a directory, a hub id, an s3:// address, or {MICRO_LLAMA}",
        )
    final = Path(path) / "final"
    return locate_source(final if where == "local" and (final / CONFIG_FILE).is_file() else path)
