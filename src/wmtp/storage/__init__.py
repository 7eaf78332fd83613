"""Storage: where paths point, and publishing files and folders atomically."""

from wmtp.storage.atomic import publish_directory, verify_manifest, write_bytes_atomic, write_json_atomic
from wmtp.storage.paths import BUILTIN_DATASETS, BUILTIN_MODELS, PathResolver

__all__ = [
    "BUILTIN_DATASETS",
    "BUILTIN_MODELS",
    "PathResolver",
    "publish_directory",
    "verify_manifest",
    "write_bytes_atomic",
    "write_json_atomic",
]
