"""Storage: where paths point, and publishing files and folders atomically."""

from wmtp.storage.atomic import publish_directory, verify_manifest, write_bytes_atomic, write_json_atomic
from wmtp.storage.paths import BUILTIN_DATASETS, BUILTIN_MODELS, PathResolver
from wmtp.storage.s3 import S3Folder, S3Manager, create_s3_manager
from wmtp.storage.s3_streams import S3Object
from wmtp.storage.step_store import S3Store

__all__ = [
    "BUILTIN_DATASETS",
    "BUILTIN_MODELS",
    "PathResolver",
    "S3Folder",
    "S3Manager",
    "S3Object",
    "S3Store",
    "create_s3_manager",
    "publish_directory",
    "verify_manifest",
    "write_bytes_atomic",
    "write_json_atomic",
]
