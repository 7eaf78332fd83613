"""Tokenizers on S3: libraries read them from files, so theirs come here for as long as that takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from wmtp.components.tokenizer.raw_files import META_FILES, RAW_FILES
from wmtp.exceptions import ModelLoadError
from wmtp.settings.config import S3Settings
from wmtp.storage import S3Folder, S3Manager

TOKENIZER_FILES = (
    *RAW_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# By the model's type transformers chooses the tokenizer's class where nothing else says.
_CONFIG_FILE = "config.json"


@contextmanager
def local_path(path: str, s3: S3Settings | None) -> Iterator[str]:
    """The path as tokenizer libraries can read it: `path` itself, or for `s3://` a folder that goes with the
    block.

    Raises:
        ModelLoadError: there is no tokenizer in the folder on S3.
        StorageError: S3 does not give it.
    """
    if not path.startswith("s3://"):
        yield path
        return
    manager = S3Manager(s3 or S3Settings())
    above, _, last = path.rpartition("/")
    source, wanted = (
        (manager.folder(above), (last,)) if last in TOKENIZER_FILES else _find_files(manager.folder(path))
    )
    with TemporaryDirectory(prefix="wmtp-tokenizer-") as folder:
        for name in wanted:
            with source.open(name) as stream, (Path(folder) / name).open("wb") as file:
                shutil.copyfileobj(stream, file)
        yield str(Path(folder) / last) if wanted == (last,) else folder


def _find_files(folder: S3Folder) -> tuple[S3Folder, tuple[str, ...]]:
    """The folder that has the tokenizer, and its files; for native weights it may be one folder up."""
    found = _names(folder)
    if not found and folder.names().intersection(META_FILES):
        above = folder.parent()
        if above is not None and (found := _names(above)):
            return above, found
    if not found:
        raise ModelLoadError(
            f"{folder} has no tokenizer (it holds: {', '.join(sorted(folder.names())[:8]) or 'no files'})",
            remedy="put tokenizer.json or tokenizer.model there, or set model.tokenizer.path",
        )
    return folder, found + ((_CONFIG_FILE,) if _CONFIG_FILE in folder.names() else ())


def _names(folder: S3Folder) -> tuple[str, ...]:
    return tuple(sorted(folder.names().intersection(TOKENIZER_FILES)))
