"""Atomic publishing of files and folders, with a manifest of sizes and SHA-256 digests as the commit point.

The code is in `wmtp.distributed.publishing`, which checkpoints use and which must not import this package.
"""

from __future__ import annotations

from wmtp.distributed.publishing import (
    MANIFEST_NAME,
    file_sha256,
    publish_directory,
    read_manifest,
    verify_manifest,
    write_bytes_atomic,
    write_json_atomic,
)

__all__ = [
    "MANIFEST_NAME",
    "file_sha256",
    "publish_directory",
    "read_manifest",
    "verify_manifest",
    "write_bytes_atomic",
    "write_json_atomic",
]
