"""One rank of a run on several: a real trainer that tells of each step, for `test_trainer_signals.py`.

Arguments: rank, number of ranks, a file for them to meet, the file that asks this rank to save.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest_trainer import build_trainer, make_recipe

from wmtp.components.trainer.callbacks import Callback, RequestCallback, StopSignals


class Saves(Callback):
    """Stands where the checkpoints are saved: tells of each step, and of each save that is asked for."""

    def on_step_end(self, run: Any, result: Any) -> None:
        """Answer a request."""
        time.sleep(0.01)
        if run.save_requested:
            run.save_requested = False
            print(f"saved {run.step}", flush=True)
        print(f"step {run.step}", flush=True)


def main() -> None:
    """Train until a signal comes to one of the ranks."""
    rank, world_size, meeting, save_file = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world_size)
    )
    recipe = make_recipe(train={"max_steps": 5000}, data={"train": {"batch_size": 1}})
    with StopSignals() as signals, signals.deferred():
        requests = RequestCallback(signals, Path(save_file))
        built = build_trainer(recipe, callbacks=[requests, Saves()])
        result = built.trainer.run(built.context)
    print(f"stopped {result.step} {result.stop_reason}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
