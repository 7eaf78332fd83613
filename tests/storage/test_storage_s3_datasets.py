"""Rows of dataset files on S3: every container and compression, through a server that cuts connections."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from fault_proxy import Fault, FaultProxy, run_fault_proxy
from s3_server import S3Server
from wmtp.exceptions import DataError, StorageMissingError
from wmtp.storage import S3Manager

pytestmark = pytest.mark.s3

# Numbers that do not compress: several parts of the smallest size.
ROWS = [{"id": number, "text": os.urandom(4000).hex()} for number in range(1500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def to_parquet() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=400)
    return file.getvalue()


FILES = {
    "rows.jsonl": lambda: LINES,
    "rows.jsonl.gz": lambda: gzip.compress(LINES, 1),
    "rows.jsonl.zst": lambda: zstandard.compress(LINES, 1),
    "rows.json": lambda: json.dumps(ROWS).encode(),
    "rows.parquet": to_parquet,
}


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with run_fault_proxy(s3_server.endpoint_url) as running:
        yield running


@pytest.fixture(scope="module")
def manager(s3_server: S3Server, proxy: FaultProxy) -> S3Manager:
    changed = {"endpoint_url": proxy.endpoint_url, "part_size_mib": 5, "max_concurrency": 2}
    return S3Manager(s3_server.settings.model_copy(update=changed))


@pytest.mark.parametrize("name", FILES)
def test_rows_arrive_in_order_whatever_the_file_is(manager: S3Manager, proxy: FaultProxy, name: str) -> None:
    with manager.upload(f"data/{name}") as stream:
        stream.write(FILES[name]())
    proxy.inject(Fault(method="GET", path="data/", cut_response_after=1_000_000, times=2))
    assert list(manager.stream_dataset(f"data/{name}")) == ROWS


def test_rows_come_before_the_file_is_read_to_its_end(manager: S3Manager, proxy: FaultProxy) -> None:
    with manager.upload("data/long.jsonl") as stream:
        for _ in range(4):
            stream.write(LINES)
    proxy.inject()
    rows = manager.stream_dataset("data/long.jsonl")
    assert next(rows) == ROWS[0]
    assert proxy.count("GET") <= 2 + 2  # of ten parts: two on their way, and a look at the first bytes
    rows.close()


def test_a_row_that_cannot_be_read_is_named(manager: S3Manager) -> None:
    manager.write_bytes("data/bad.jsonl", b'{"a": 1}\n\n{"a": \n')
    rows = manager.stream_dataset("data/bad.jsonl")
    assert next(rows) == {"a": 1}
    with pytest.raises(DataError, match=r"s3://wmtp/data/bad\.jsonl:3: not valid JSON"):
        next(rows)
    manager.write_bytes("data/cut.jsonl.gz", gzip.compress(LINES)[:-1000])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read after line 1\d\d\d"):
        list(manager.stream_dataset("data/cut.jsonl.gz"))
    with pytest.raises(StorageMissingError, match="data/none does not exist"):
        next(manager.stream_dataset("data/none"))
