"""Checkpoints on a real S3 server: whole or absent, one writer, and a server that goes away."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from checkpoint_cases import FILES, assert_found, damages, save, tensors, use

from fault_proxy import Fault, run_fault_proxy
from s3_server import S3Server, run_s3_server
from wmtp.components.loader.step_stores import find_checkpoint, open_fallback_store, open_run_store
from wmtp.distributed.checkpoint import (
    Retention,
    copy_checkpoint,
    find_latest_valid,
    list_checkpoints,
    save_checkpoint,
)
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_saver import CheckpointSaver, SaveRequest
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.distributed.publishing import manifest_bytes
from wmtp.exceptions import CheckpointError, StorageError, StorageUnavailableError
from wmtp.pipelines.callbacks import build_saver
from wmtp.pipelines.environment import run_paths
from wmtp.settings import Config, Recipe
from wmtp.settings.config import S3Settings
from wmtp.storage import S3Manager, S3Store

pytestmark = pytest.mark.s3


@pytest.fixture
def manager(s3_server: S3Server) -> S3Manager:
    return S3Manager(s3_server.settings.model_copy(update={"lease_s": 1.0, "deadline_s": 20.0}))


@pytest.fixture
def store(manager: S3Manager) -> S3Store:
    return S3Store(manager, f"s3://wmtp/{uuid.uuid4().hex}/run")


def _again(store: S3Store) -> S3Store:
    """The same run as another process sees it."""
    return S3Store(store._manager, store.uri())


def _names(store: S3Store) -> set[str]:
    return {found.key.removeprefix(f"{store.uri()}/") for found in store._manager.list_objects(store.uri())}


def _keys(store: S3Store, name: str) -> dict[str, str]:
    """The objects of a step, by the names that messages use."""
    return {key.rpartition("/")[2]: store.uri(key) for key in _names(store) if key.startswith(f"{name}/")}


# ------------------------------------------------------------------------------------------ whole or absent


def test_a_checkpoint_comes_back_and_the_layout_is_as_documented(store: S3Store) -> None:
    checkpoint = save(store, 5)
    use(store, "step-5")
    (folder,) = {name.split("/")[1] for name in _names(store) if name.count("/") == 2}
    assert _names(store) == {
        "latest",
        "step-5/manifest.json",
        *(f"step-5/{folder}/{file}" for file in FILES if file != "manifest.json"),
    }
    assert store._manager.read_bytes(store.uri("latest"))[0] == b"step-5\n"
    assert checkpoint.files.keys() == set(FILES) - {"manifest.json"}
    assert find_latest_valid(store)[0] is not None


@pytest.mark.parametrize("file", FILES)
def test_a_byte_flipped_cut_or_added_is_found_before_use(
    store: S3Store, manager: S3Manager, file: str
) -> None:
    save(store, 5)
    key = _keys(store, "step-5")[file]
    content = manager.read_bytes(key)[0]
    # Every third: the local test goes through all of them.
    for damage, changed in list(damages(content))[:: 3 if file.endswith("json") else 2]:
        manager.write_bytes(key, changed)
        assert_found(store, "step-5", file, f"{file} {damage}")
    manager.delete([key])
    assert_found(store, "step-5", file, f"{file} deleted")
    manager.write_bytes(key, content)
    use(store, "step-5")


def test_names_that_lead_out_of_the_step_are_refused(store: S3Store, manager: S3Manager) -> None:
    save(store, 5)
    manager.write_bytes(store.uri("secret"), b"{}")
    manifest = json.loads(store.manifest("step-5"))
    files = {**manifest["files"], f"{manifest['prefix']}../../secret": {"size": 2, "sha256": "0"}}
    extra = {key: manifest[key] for key in manifest.keys() - {"files", "sha256", "schema"}}
    manager.write_bytes(store.uri("step-5/manifest.json"), manifest_bytes(files, extra))
    with pytest.raises(CheckpointError, match="points out of the folder"):
        Checkpoint(store, "step-5")
    for read in (store.size, lambda name, file: store.open(name, file).__enter__()):
        with pytest.raises(OSError, match="points out"):
            read("step-5", "../secret")


def test_a_step_saved_again_replaces_the_old_one_in_one_moment(store: S3Store) -> None:
    save(store, 5)
    first = set(_keys(store, "step-5").values())
    save_checkpoint(store, 5, tensors=tensors(2.0), state={"n": 5})
    assert float(Checkpoint(store, "step-5").read("model")["w"][0, 0]) == 2.0
    assert set(_keys(store, "step-5").values()) & first == {store.uri("step-5/manifest.json")}


def test_old_ones_go_and_leftovers_are_removed(store: S3Store, manager: S3Manager) -> None:
    leftover = store.uri(f"step-9/{uuid.uuid4().hex}/model.safetensors")
    manager.write_bytes(leftover, b"half")
    manager.write_bytes(store.uri("step-2x/mine"), b"mine")
    manager.write_bytes(store.uri("tokenizer/tokenizer.json"), b"mine")
    save(store, 1)
    damaged = store.uri("step-1/manifest.json")
    content = manager.read_bytes(damaged)[0]
    manager.write_bytes(damaged, content[:-3])
    for step in (2, 3, 4):
        save(store, step, retention=Retention(keep_last=2))
    assert {name.split("/")[0] for name in _names(store)} == {
        "latest",
        "tokenizer",
        "step-2x",
        # Nothing is deleted that cannot be told apart from the only copy.
        "step-1",
        "step-3",
        "step-4",
    }
    assert manager.read_bytes(store.uri("latest"))[0] == b"step-4\n"


def test_what_a_save_left_before_its_manifest_is_skipped_by_name(store: S3Store) -> None:
    save(store, 1)
    draft = store.draft("step-2", uuid.uuid4().hex)
    with draft.create("model.safetensors") as file:
        file.write(b"x" * 100)
    checkpoint, skipped = find_latest_valid(store)
    assert checkpoint is not None
    assert checkpoint.name == "step-1"
    assert skipped == [("step-2", "it has no manifest.json: the save was not finished")]
    assert [info.name for info in list_checkpoints(store)] == ["step-1"]
    draft.abandon()
    assert _keys(store, "step-2") == {}


def test_a_save_that_fails_leaves_nothing(store: S3Store) -> None:
    save(store, 1)
    bad = {"model": {"x": torch.zeros(2, dtype=torch.complex128)}, "a": {"y": torch.ones(3)}}
    with pytest.raises(TypeError):
        save_checkpoint(store, 2, tensors=bad, state={})
    assert _keys(store, "step-2") == {}


def test_a_checkpoint_is_copied_from_a_disk_with_its_place_in_the_order(
    store: S3Store, tmp_path: Path
) -> None:
    local = LocalStore(tmp_path)
    save(store, 1)
    info = copy_checkpoint(save(local, 2, sequence_after=7), store)
    assert (info.step, info.sequence) == (2, 8)
    use(store, "step-2")


# ------------------------------------------------------------------------------------------ one writer


def _hold(settings: S3Settings, uri: str, ready: Any) -> None:
    store = S3Store(S3Manager(settings), uri)
    with store.only_writer():
        save(store, 1)
        ready.set()
        time.sleep(120)


def _save_until_killed(settings: S3Settings, uri: str, ready: Any) -> None:
    torch.set_num_threads(1)
    store = S3Store(S3Manager(settings), uri)
    with store.only_writer():
        save(store, 1)
        ready.set()
        for step in range(2, 1000):
            save(store, step, retention=Retention(keep_last=2))


def _start(work: Callable[..., None], store: S3Store) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=work, args=(store._manager.settings, store.uri(), ready))
    child.start()
    assert ready.wait(60)
    return child


@pytest.fixture
def end() -> Iterator[list[multiprocessing.process.BaseProcess]]:
    children: list[multiprocessing.process.BaseProcess] = []
    yield children
    for child in children:
        child.kill()
        child.join()


def test_a_second_writer_is_refused_and_takes_over_at_once_when_the_first_is_killed(
    store: S3Store, end: list[multiprocessing.process.BaseProcess]
) -> None:
    child = _start(_hold, store)
    end.append(child)
    with pytest.raises(CheckpointError, match=f"Another process.*{child.pid}"), store.only_writer():
        pass
    child.kill()
    child.join()
    start = time.monotonic()
    slow = S3Store(S3Manager(store._manager.settings.model_copy(update={"lease_s": 600.0})), store.uri())
    with slow.only_writer():
        save(slow, 2)
    assert time.monotonic() - start < 30
    assert "writer.json" not in _names(store)
    assert [info.step for info in list_checkpoints(store)] == [1, 2]


@pytest.mark.parametrize("seconds", [0.2, 0.5])
def test_a_killed_writer_leaves_only_whole_checkpoints(
    store: S3Store, end: list[multiprocessing.process.BaseProcess], seconds: float
) -> None:
    child = _start(_save_until_killed, store)
    end.append(child)
    time.sleep(seconds)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    checkpoint, _ = find_latest_valid(store)
    assert checkpoint is not None
    use(store, checkpoint.name)
    before = checkpoint.info
    assert save(store, 2000).info.sequence == before.sequence + 1
    # The server lists folders for a while after their last object has gone.
    steps = [keys for folder in store.folders() if (keys := _keys(store, folder.name))]
    assert all("manifest.json" in keys for keys in steps)


def _claim_of_another_host(store: S3Store, **changes: Any) -> None:
    process = {"host": "elsewhere", "pid": 1, "started": "then"}
    content = {"id": "theirs", "process": process, "time": time.time_ns(), **changes}
    store._manager.write_bytes(store.uri("writer.json"), json.dumps(content).encode())


def test_a_process_number_of_another_boot_says_nothing_about_the_writer(store: S3Store) -> None:
    """Virtual machines of one image have one host name and one number of the process namespace."""
    with store.only_writer():
        process = json.loads(store._manager.read_bytes(store.uri("writer.json"))[0])["process"]
    boot, _, start = process["started"].partition(":")
    # Of this boot: a process that has ended. Of another: one that may live.
    for started, is_waited_for in ((f"{boot}:{start}9", False), (f"other-boot:{start}", True)):
        _claim_of_another_host(store, process={**process, "started": started})
        begin = time.monotonic()
        slow = S3Store(S3Manager(store._manager.settings.model_copy(update={"lease_s": 3.0})), store.uri())
        with slow.only_writer():
            assert (time.monotonic() - begin >= 3.0) == is_waited_for


def test_a_silent_writer_of_another_host_is_taken_over_after_the_lease(store: S3Store) -> None:
    _claim_of_another_host(store)
    start = time.monotonic()
    with store.only_writer():
        assert time.monotonic() - start >= 1.0
        save(store, 1)
    assert "writer.json" not in _names(store)


def test_a_writer_of_another_host_that_renews_is_not_taken_over(store: S3Store) -> None:
    other = _again(store)
    with other.only_writer():
        claim = json.loads(store._manager.read_bytes(store.uri("writer.json"))[0])
        assert claim["process"]["pid"] == os.getpid()
        with pytest.raises(CheckpointError, match="Another process is writing"), store.only_writer():
            pass
        save(other, 1)
    save(store, 2)


def test_a_claim_that_was_taken_over_is_noticed_before_the_next_commit(store: S3Store) -> None:
    settings = store._manager.settings.model_copy(update={"lease_s": 600.0})
    slow = S3Store(S3Manager(settings), store.uri())
    with slow.only_writer():
        save(slow, 1)
        # As if this process had slept for longer than the lease; its next renewal is minutes away.
        _claim_of_another_host(store)
        with pytest.raises(CheckpointError, match=r"taken over.*elsewhere"):
            save(slow, 2)
        with pytest.raises(CheckpointError, match="taken over"):
            save(slow, 3)
    assert {name for name in _names(store) if name.startswith(("step-2", "step-3"))} == set()
    # The other one's claim is not ours to remove.
    assert "writer.json" in _names(store)


def test_a_claim_that_the_other_one_has_given_up_again_stays_lost(store: S3Store) -> None:
    with store.only_writer():
        save(store, 1)
        store._manager.delete([store.uri("writer.json")])
        with pytest.raises(CheckpointError, match="taken over"):
            save(store, 2)


def test_a_renewal_whose_answer_was_lost_is_no_take_over(store: S3Store) -> None:
    with store.only_writer():
        claim = store._claim
        assert claim is not None
        # Written by this process, unknown to it.
        claim._write(if_match=claim._etag)
        save(store, 1)
        time.sleep(1.2)
        save(store, 2)
    assert "writer.json" not in _names(store)


def test_a_claim_that_is_no_json_is_waited_for_and_taken_over(store: S3Store) -> None:
    store._manager.write_bytes(store.uri("writer.json"), b"\xff[")
    with store.only_writer():
        save(store, 1)


def test_two_that_save_the_same_step_at_once_do_not_mix(store: S3Store) -> None:
    draft = store.draft("step-1", uuid.uuid4().hex)
    with draft.create("state.json") as file:
        file.write(b"{}")
    save(_again(store), 1)
    with pytest.raises(CheckpointError, match="in the meantime"):
        draft.commit(b"{}")
    draft.abandon()
    use(store, "step-1")


# ------------------------------------------------------------------------------------------ server away


@pytest.fixture
def mortal_server(tmp_path: Path) -> Iterator[S3Server]:
    with run_s3_server(tmp_path / "server") as server:
        yield server


def test_while_the_server_is_away_saves_go_elsewhere_and_come_back_in_order(
    mortal_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A request is given up after a quarter of it.
    deadline_s = 8.0
    settings = mortal_server.settings.model_copy(
        update={"deadline_s": deadline_s, "fallback_dir": str(tmp_path / "fallback"), "max_attempts": 2}
    )
    config = Config.model_validate({"paths": {"output": "s3://wmtp/out"}})
    config = config.model_copy(update={"s3": settings})
    paths = run_paths(config, "mine")
    uri = paths.run_uri
    store = open_run_store(config, uri)
    fallback = open_fallback_store(config, uri)
    assert fallback is not None
    recipe = Recipe.model_validate(
        {
            "train": {
                "algo": "baseline-mtp",
                "max_steps": 9,
                "keep_last": 9,
                "async_checkpoints": True,
            },
            "data": {"train": {"sources": ["microcode"]}},
        }
    )
    saver = build_saver(config, recipe, paths, store, None)
    manager = S3Manager(settings)
    # A new server takes its time over its first object.
    S3Manager(mortal_server.settings).write_bytes("s3://wmtp/out/metrics.jsonl", b"1\n")

    def save_step(step: int) -> float:
        begin = time.monotonic()
        content = tensors(float(step))

        def before() -> None:
            manager.write_bytes("s3://wmtp/out/metrics.jsonl", f"{step}\n".encode())

        saver.save(SaveRequest(step, content, {"n": step}, before=before))
        saver.wait()
        return time.monotonic() - begin

    # The claim is held by each save: a server that is away at the end of a run is another test's matter.
    save_step(1)
    mortal_server.kill()
    assert save_step(2) < 2 * deadline_s, "one deadline for metrics and checkpoint together"
    assert save_step(3) < deadline_s
    assert f"step 2 was saved to {fallback.uri()}" in caplog.text
    use(fallback, "step-2")
    with pytest.raises(StorageUnavailableError):
        find_checkpoint(config, uri)
    saver.bring_back()
    assert "is still away; the last checkpoints are in" in caplog.text

    mortal_server.start()
    found = _when_it_is_up(lambda: find_checkpoint(config, uri))
    assert (found.info.step, found.info.sequence, found.store.uri()) == (3, 3, fallback.uri())
    _when_it_is_up(lambda: save(S3Store(manager, "s3://wmtp/other"), 1))
    save_step(4)
    saver.close()
    assert [(i.step, i.sequence) for i in list_checkpoints(store)] == [(n, n) for n in range(1, 5)]
    assert list_checkpoints(fallback) == []
    assert manager.read_bytes("s3://wmtp/out/metrics.jsonl")[0] == b"4\n"
    assert "step 3 was brought from" in caplog.text
    assert [info.uri for info in saver.take_committed()][-1] == f"{uri}/step-4"
    found = find_checkpoint(config, uri)
    assert (found.info.step, found.store.uri()) == (4, uri)
    use(found.store, "step-4")
    assert find_checkpoint(config, f"{uri}/step-2").state == {"n": 2}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (507, b"<Error><Code>XMinioStorageFull</Code></Error>", "no space left"),
        (400, b"<Error><Code>ExpiredToken</Code></Error>", "have expired"),
        (403, b"<Error><Code>AccessDenied</Code></Error>", "refuses access"),
    ],
)
def test_a_server_that_refuses_loses_no_checkpoint(
    s3_server: S3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: bytes,
    said: str,
) -> None:
    with run_fault_proxy(s3_server.endpoint_url) as proxy:
        settings = s3_server.settings.model_copy(update={"endpoint_url": proxy.endpoint_url})
        uri = f"s3://wmtp/{uuid.uuid4().hex}/run"
        store, fallback = S3Store(S3Manager(settings), uri), LocalStore(tmp_path)
        saver = CheckpointSaver(store, Retention(), fallback=fallback)
        with store.only_writer():
            refusal = Fault("PUT", "step-2", times=1000, status=status, body=body)
            proxy.inject(refusal)
            for step in (1, 2, 3):
                saver.save(SaveRequest(step, tensors(float(step)), {"n": step}))
            assert said in caplog.text
            assert [i.step for i in list_checkpoints(fallback)] == [2, 3]
            use(fallback, "step-2")
            refusal.times = 0
            saver.bring_back()
        assert [(i.step, i.sequence) for i in list_checkpoints(store)] == [(1, 1), (2, 2), (3, 3)]
        use(store, "step-2")
        assert list_checkpoints(fallback) == []


def _when_it_is_up(call: Callable[[], Checkpoint]) -> Checkpoint:
    """Its own parts find each other some seconds after the server answers."""
    give_up = time.monotonic() + 60
    while True:
        try:
            return call()
        except StorageError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.5)


def test_of_two_stores_the_newest_whole_one_counts(
    s3_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = s3_server.settings.model_copy(update={"fallback_dir": str(tmp_path)})
    config = Config().model_copy(update={"s3": settings})
    uri = f"s3://wmtp/{uuid.uuid4().hex}/run"
    store, fallback = open_run_store(config, uri), open_fallback_store(config, uri)
    assert fallback is not None
    save(store, 1)
    save(fallback, 2, sequence_after=1)
    assert find_checkpoint(config, uri).store is not store
    assert find_checkpoint(config, uri).name == "step-2"
    Path(fallback.uri("step-2"), "state.json").write_text("[]")
    assert find_checkpoint(config, uri).name == "step-1"
    assert "step-2 was skipped: state.json" in caplog.text
    save(store, 1, sequence_after=5)
    assert find_checkpoint(config, uri).info.sequence == 6
