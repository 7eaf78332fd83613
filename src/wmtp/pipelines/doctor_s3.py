"""Whether S3 works: credentials, server, clock, buckets, what is to be read, and writing where results go."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from wmtp.exceptions import StorageConflictError, StorageError
from wmtp.pipelines.doctor_check import Check, first_line
from wmtp.settings import Config
from wmtp.settings.config import S3Settings
from wmtp.storage.s3_client import S3Client
from wmtp.storage.s3_errors import explain, fault_types

# S3 refuses signatures that are more than 15 minutes off.
_MAX_SKEW_S = 14 * 60.0
_NOTED_SKEW_S = 60.0
_TIMEOUT_S = 5.0
_SOURCES = {
    "env": "the environment (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "~/.aws/credentials",
    "config-file": "~/.aws/config",
    "iam-role": "the role of this machine",
    "container-role": "the role of this container",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "an assumed role (web identity)",
    "sso": "single sign-on",
    "custom-process": "the credential process of ~/.aws/config",
}
_GROUP = "s3"

Probe = Literal["none", "results", "bucket"]


def s3_addresses(config: Config) -> dict[str, str]:
    """The keys of a config that name something on S3, with their addresses."""
    sections = {
        **{f"paths.models.{name}": value for name, value in config.paths.models.model_dump().items()},
        **{f"paths.datasets.{name}": value for name, value in config.paths.datasets.model_dump().items()},
        "paths.output": config.paths.output,
        "mlflow.tracking_uri": config.mlflow.tracking_uri,
        "mlflow.registry_uri": config.mlflow.registry_uri,
        "mlflow.artifact_location": config.mlflow.artifact_location,
    }
    return {key: uri for key, uri in sections.items() if uri is not None and uri.startswith("s3://")}


def uses_s3(config: Config) -> bool:
    """Whether a config has anything to do with S3."""
    return bool(s3_addresses(config)) or config.s3.bucket is not None


def check_s3(config: Config, *, probe: Probe) -> Iterator[Check]:
    """Look at everything on S3 that a config names; one line each.

    Args:
        config: whose addresses are tried.
        probe: where something is written, read and deleted again: `results`, where results go; `bucket`, in
            `s3.bucket` too where none go to S3; or `none`.
    """
    if not uses_s3(config):
        yield Check(_GROUP, "access", "works", "not configured: no path begins with s3://")
        return
    try:
        # A quarter of this is what botocore may wait for one answer.
        client = S3Client(config.s3.model_copy(update={"deadline_s": 4 * _TIMEOUT_S}))
        credentials = _check_credentials(config.s3)
        yield credentials
        endpoint = client.where
    except StorageError as error:
        yield _broken("access", error)
        return
    reached = list(_check_server(endpoint))
    yield from reached
    if any(check.status == "broken" for check in (credentials, *reached)):
        return
    usable = set()
    addresses = s3_addresses(config)
    buckets = [_split(uri)[0] for uri in addresses.values()]
    for bucket in dict.fromkeys([*buckets, *([config.s3.bucket] if config.s3.bucket else [])]):
        check = _check_bucket(client, bucket)
        yield check
        if check.status == "works":
            usable.add(bucket)
    for key, uri in addresses.items():
        if _split(uri)[0] in usable and key.startswith(("paths.models.", "paths.datasets.")):
            yield _check_read(client, key, uri)
    for key, uri in _places_to_write(config, addresses, probe).items():
        if _split(uri)[0] in usable:
            yield from _check_write(client, key, uri)


def clock_skew_s(date: str, now_s: float) -> float:
    """How far this machine's clock is ahead of a server's, in seconds.

    Args:
        date: the header `Date` of an answer; whole seconds.
        now_s: this machine's time, in seconds since 1970.

    Raises:
        ValueError: it is no date.
    """
    return now_s - parsedate_to_datetime(date).timestamp()


def _check_credentials(settings: S3Settings) -> Check:
    if settings.access_key_id is not None:
        return Check(_GROUP, "credentials", "works", "from the config (s3.access_key_id)")
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or s3.access_key_id and s3.secret_access_key"
    try:
        found = Session().get_credentials()
    except BotoCoreError as error:
        return Check(_GROUP, "credentials", "broken", first_line(error), remedy)
    if found is None:
        looked = "environment, ~/.aws, and the role of this machine"
        return Check(_GROUP, "credentials", "broken", f"none found ({looked} were looked at)", remedy)
    profile = os.environ.get("AWS_PROFILE")
    where = _SOURCES.get(found.method, found.method)
    return Check(_GROUP, "credentials", "works", f"from {where}{f', profile {profile}' if profile else ''}")


def _check_server(endpoint: str) -> Iterator[Check]:
    """Ask the server for anything: any answer of HTTP will do, and has the server's time in it."""
    begin = time.monotonic()
    try:
        with urllib.request.urlopen(endpoint, timeout=_TIMEOUT_S) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
        error.close()
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        remedy = "check s3.endpoint_url (http or https, host, port), the network, and the server"
        yield Check(_GROUP, "server", "broken", f"{endpoint} cannot be reached: {reason}", remedy)
        return
    spent_ms = 1000 * (time.monotonic() - begin)
    yield Check(_GROUP, "server", "works", f"{endpoint} answers in {spent_ms:.0f} ms")
    if date is None:
        yield Check(_GROUP, "clock", "works", "the server does not say its time")
        return
    try:
        skew_s = clock_skew_s(date, time.time())
    except ValueError:
        yield Check(_GROUP, "clock", "warning", f"the server gives its time as {date!r}", "")
        return
    yield _judge_skew(skew_s)


def _judge_skew(skew_s: float) -> Check:
    direction = "ahead of" if skew_s > 0 else "behind"
    detail = f"this machine is {abs(skew_s):.0f} s {direction} the server"
    remedy = "set the clock of this machine, or let it be set (timedatectl set-ntp true)"
    if abs(skew_s) > _MAX_SKEW_S:
        return Check(
            _GROUP, "clock", "broken", f"{detail}; S3 refuses signatures that are 15 min off", remedy
        )
    if abs(skew_s) > _NOTED_SKEW_S:
        return Check(_GROUP, "clock", "warning", f"{detail}; from 15 min on S3 refuses signatures", remedy)
    return Check(_GROUP, "clock", "works", "agrees with the server's")


def _check_bucket(client: S3Client, bucket: str) -> Check:
    error, _ = _ask(client, f"s3://{bucket}", "list_objects_v2", Bucket=bucket, MaxKeys=1)
    subject = f"bucket {bucket}"
    return Check(_GROUP, subject, "works", "can be listed") if error is None else _broken(subject, error)


def _check_read(client: S3Client, key: str, uri: str) -> Check:
    """Whether there is anything at an address, and its first byte can be read."""
    bucket, prefix = _split(uri)
    error, answer = _ask(client, uri, "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=20)
    if error is not None:
        return _broken(key, error)
    inside = f"{prefix.rstrip('/')}/"
    names = [
        entry["Key"]
        for entry in answer.get("Contents", [])
        if (entry["Key"] == prefix or not prefix or entry["Key"].startswith(inside)) and entry["Size"]
    ]
    if not names:
        remedy = "check the address, or copy the files there"
        return Check(_GROUP, key, "broken", f"nothing is at {uri}", remedy)
    first = {"Bucket": bucket, "Key": names[0]}
    error, answer = _ask(client, f"s3://{bucket}/{names[0]}", "get_object", **first, Range="bytes=0-0")
    if error is not None:
        return _broken(key, error)
    answer["Body"].close()
    return Check(_GROUP, key, "works", f"{uri} can be read")


def _places_to_write(config: Config, addresses: dict[str, str], probe: Probe) -> dict[str, str]:
    if probe == "none":
        return {}
    keys = ("paths.output", "mlflow.tracking_uri", "mlflow.artifact_location")
    by_uri = {addresses[key]: key for key in reversed(keys) if key in addresses}
    places = {key: uri for uri, key in by_uri.items()}
    if probe == "bucket" and "paths.output" not in places and config.s3.bucket is not None:
        places["s3.bucket"] = f"s3://{config.s3.bucket}"
    return places


def _check_write(client: S3Client, key: str, uri: str) -> Iterator[Check]:
    """Write an object, read it, write it once more on the condition that it is absent, and delete it."""
    bucket, prefix = _split(uri)
    name = f"{prefix.rstrip('/')}/.wmtp-doctor-{uuid.uuid4().hex}".lstrip("/")
    place = f"s3://{bucket}/{name}"
    subject = f"{key} (writing)"
    probe = {"Bucket": bucket, "Key": name}
    content = os.urandom(64)
    error, _ = _ask(client, place, "put_object", **probe, Body=content)
    if error is not None:
        yield _broken(subject, error)
        return
    try:
        problem = _check_content(client, place, probe, content)
    finally:
        left, _ = _ask(client, place, "delete_object", **probe)
    if problem is not None:
        yield replace(problem, subject=subject)
    if left is not None:
        detail = f"the probe {place} could not be deleted: {left.message}"
        remedy = "allow s3:DeleteObject there, and delete it yourself"
        yield Check(_GROUP, f"{key} (deleting)", "broken", detail, remedy)
    if problem is None and left is None:
        yield Check(_GROUP, subject, "works", f"a probe under {uri} was written, read and deleted")


def _check_content(client: S3Client, place: str, probe: dict[str, str], content: bytes) -> Check | None:
    """What is wrong with an object that was written, or with writes on a condition."""
    error, answer = _ask(client, place, "get_object", **probe)
    if error is not None:
        return _broken("", error)
    if answer["Body"].read() != content:
        detail = f"{place} came back with other bytes than were written"
        return Check(_GROUP, "", "broken", detail, "check the server and what stands between")
    # A checkpoint on S3 becomes valid by a write on this condition.
    error, _ = _ask(client, place, "put_object", **probe, Body=content, IfNoneMatch="*")
    if isinstance(error, StorageConflictError):
        return None
    if error is not None:
        return _broken("", error)
    detail = "the server replaces an object although it was told not to (If-None-Match)"
    remedy = "two runs could overwrite each other's checkpoints there; use a server that knows the condition"
    return Check(_GROUP, "", "broken", detail, remedy)


def _ask(
    client: S3Client, uri: str, operation: str, **arguments: Any
) -> tuple[StorageError | None, dict[str, Any]]:
    """Make one try of a request; returns what went wrong, or None, and the answer."""
    try:
        return None, client.request_once(operation, **arguments)
    except fault_types() as error:
        return explain(error, uri, client.where).error, {}


def _broken(subject: str, error: StorageError) -> Check:
    return Check(_GROUP, subject, "broken", error.message, error.remedy or "")


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
