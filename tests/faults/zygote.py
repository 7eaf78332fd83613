"""A process that has imported everything and forks training processes; it marks their saves and kills them.

Run as a script by `harness.Zygote`: one JSON job a line on stdin, one JSON answer a line on stdout.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# What a training process says of itself; it outlives the process, whatever that dies of.
SLOTS = (
    "in_save",  # 1 while save_checkpoint runs
    "in_upload",  # 1 while a file beside the checkpoints goes to S3
    "num_saves",  # saves begun
    "num_calls",  # writes, syncs, renames and requests of the present save
    "most_calls",  # of any save so far
    "saving_step",
    "committed_step",
    "finished_step",
    "start_step",
    "num_bytes",  # of the present save
    "save_us",  # the longest save so far
)


class Board:
    """Numbers in a file that two processes have in their memory."""

    def __init__(self, path: str) -> None:
        Path(path).write_bytes(struct.pack(f"<{len(SLOTS)}q", *([0] * len(SLOTS))))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, name: str) -> int:
        value: int = struct.unpack_from("<q", self._memory, 8 * SLOTS.index(name))[0]
        return value

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._memory, 8 * SLOTS.index(name), value)

    def values(self) -> dict[str, int]:
        """All of them."""
        return {name: self[name] for name in SLOTS}


class Marks:
    """In the training process: marks saves on the board, and dies at a chosen call of a chosen save."""

    def __init__(self, board: Board, plan: dict[str, Any]) -> None:
        self.board = board
        self.plan = plan
        self._lock = threading.Lock()

    def install(self) -> None:
        """Wrap the calls of a save in this process."""
        from wmtp.components.trainer.callbacks.checkpointing import CheckpointCallback
        from wmtp.distributed import checkpoint_saver, checkpoint_store
        from wmtp.pipelines.remote_output import RemoteOutput
        from wmtp.storage.s3_client import S3Client

        board = self.board
        save, upload = checkpoint_saver.save_checkpoint, RemoteOutput.upload
        start, end = CheckpointCallback.on_train_start, CheckpointCallback.on_step_end

        def marked_save(store: Any, step: int, **arguments: Any) -> Any:
            began = time.perf_counter()
            board["saving_step"], board["num_calls"], board["num_bytes"] = step, 0, 0
            board["num_saves"] += 1
            board["in_save"] = 1
            info = save(store, step, **arguments)
            board["committed_step"] = step
            board["in_save"] = 0
            board["most_calls"] = max(board["most_calls"], board["num_calls"])
            board["save_us"] = max(board["save_us"], int(1e6 * (time.perf_counter() - began)))
            return info

        def marked_upload(self: Any, path: Path) -> None:
            board["in_upload"] = int(self._manager is not None)
            upload(self, path)
            board["in_upload"] = 0

        def marked_start(self: Any, run: Any) -> None:
            board["start_step"] = board["finished_step"] = run.step
            start(self, run)

        def marked_end(self: Any, run: Any, result: Any) -> None:
            board["finished_step"] = run.step
            end(self, run, result)

        checkpoint_saver.save_checkpoint = marked_save
        RemoteOutput.upload = marked_upload  # type: ignore[method-assign]
        CheckpointCallback.on_train_start = marked_start  # type: ignore[method-assign]
        CheckpointCallback.on_step_end = marked_end  # type: ignore[method-assign]
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        request = S3Client.request_once
        S3Client.request_once = self._counted(request, takes_long=True)  # type: ignore[method-assign]
        write = checkpoint_store._FullWrites.write

        def counted_write(stream: Any, content: bytes | memoryview) -> int:
            with self._call() as share:
                if share is not None:
                    write(stream, memoryview(content)[: int(share * len(content))])
                    die()
                board["num_bytes"] += len(content)
                return write(stream, content)

        checkpoint_store._FullWrites.write = counted_write  # type: ignore[method-assign]

    def _counted(self, function: Callable[..., Any], *, takes_long: bool = False) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            with self._call() as share:
                if share is None:
                    return function(*arguments, **keywords)
                if takes_long:
                    threading.Thread(target=_die_after, args=(share * 0.01,), daemon=True).start()
                elif share < 0.5:
                    die()
                result = function(*arguments, **keywords)
                die()
                return result

        return counted

    @contextmanager
    def _call(self) -> Iterator[float | None]:
        """Count a call; how much of it may still happen where the process is to die of it."""
        if not self.board["in_save"]:
            yield None
            return
        with self._lock:
            self.board["num_calls"] += 1
            here = (self.board["num_saves"], self.board["num_calls"])
        is_it = self.plan["kind"] == "call" and here == (self.plan["save"], self.plan["call"])
        yield float(self.plan["share"]) if is_it else None


def die() -> None:
    """As by `kill -9`: nothing is flushed, closed or finished."""
    os.kill(os.getpid(), signal.SIGKILL)


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    die()


def _train(job: dict[str, Any], board: Board) -> None:
    from wmtp.pipelines import RunOptions, run_training_pipeline
    from wmtp.settings import Config, Recipe

    Marks(board, job["plan"]).install()
    run_training_pipeline(
        Config.model_validate(job["config"]),
        Recipe.model_validate(job["recipe"]),
        resume_checkpoint=job["resume"],
        options=RunOptions(run_name=job["run_name"]),
    )


def _child(job: dict[str, Any], board: Board) -> int:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _train(job, board)
        Path(job["log"] + ".modules").write_text("\n".join(sys.modules))
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
        sys.stdout.flush()


def _watch(pid: int, plan: dict[str, Any], board: Board) -> int:
    """Wait for the child's end and kill it when the plan says so; its wait status."""
    began = time.monotonic()
    deadline = began + plan["delay"] if plan["kind"] == "time" else None
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == pid:
            return status
        if plan["kind"] == "save" and deadline is None and board["num_saves"] >= plan["save"]:
            deadline = time.monotonic() + plan["delay"]
        if deadline is not None and time.monotonic() >= deadline:
            # Not reaped yet, so the number is still this child's.
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.0005 if deadline is not None or plan["kind"] == "save" else 0.01)


def _preload(modules: Path) -> None:
    """Import what a finished child had imported, so that the next ones need not."""
    if not modules.exists():
        return
    for name in modules.read_text().splitlines():
        if name not in sys.modules and name != "__mp_main__":
            with suppress(Exception):
                importlib.import_module(name)
    modules.unlink()


def main() -> None:
    """Answer jobs until stdin ends."""
    import torch.utils.data._utils.worker as worker

    import wmtp.pipelines.training  # noqa: F401 - what every child needs

    # A data worker holds the run's lock until it notices that its parent was killed, by default in 5 s.
    worker.MP_STATUS_CHECK_INTERVAL = 0.3
    answers = os.fdopen(os.dup(1), "w")
    sys.stdin.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for line in sys.stdin:
        job = json.loads(line)
        board = Board(job["board"])
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _child(job, board)
            finally:
                # Threads of the run have ended with it; the zygote's own buffers must not be flushed twice.
                os._exit(code)
        status = _watch(pid, job["plan"], board)
        seconds = time.monotonic() - began
        _preload(Path(job["log"] + ".modules"))
        answer = {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, **board.values()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # Nothing is left to do, and so much that is imported takes seconds to go.
    os._exit(0)


if __name__ == "__main__":
    main()
