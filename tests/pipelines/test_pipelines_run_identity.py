"""A run is its place, not its name: branches, equal names elsewhere, a process that is not quite dead."""

from __future__ import annotations

import errno
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from wmtp.cli.app import main
from wmtp.components.loader.step_stores import open_fallback_store
from wmtp.distributed.checkpoint import list_checkpoints, save_checkpoint
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import OutputError, UserInputError
from wmtp.pipelines import RunOptions, RunOutputs, run_training_pipeline
from wmtp.pipelines.environment import run_paths
from wmtp.pipelines.interruption import RunStage
from wmtp.pipelines.resume import refuse_existing_run
from wmtp.settings import Config, Recipe
from wmtp.tracking import read_metrics, tracking_address
from wmtp.tracking.mlflow_tracker import resolve_tracking_uri


def _config(output: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {"paths": {"output": str(output)}, "devices": {"accelerator": "cpu", "num_threads": 1}, **sections}
    )


def _recipe(max_steps: int, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "train": {
                "algo": "baseline-mtp",
                "max_steps": max_steps,
                "save_every_steps": 2,
                "keep_last": 10,
                "log_every_steps": 1,
                **train,
            },
            "model": {"base_id": "builtin:micro-llama", "mtp": {"horizon": 2}},
            "data": {
                "train": {"sources": ["microcode"], "batch_size": 1, "max_length": 64},
                "microcode": {"num_examples": 40},
            },
            "critic": {
                "reward": {"num_programs": 40},
                "pretrain": {"max_steps": 2, "batch_size": 4, "num_rollouts": 2},
            },
            "optim": {"scheduler": "constant"},
            "eval": {"datasets": [], "types": ["perplexity"], "num_workers": 1},
        }
    )


def _train(config: Config, recipe: Recipe, name: str | None, resume: str | None = None) -> RunOutputs:
    return run_training_pipeline(config, recipe, resume_checkpoint=resume, options=RunOptions(run_name=name))


def _steps(output: Path, run: str) -> list[int]:
    rows = read_metrics(output / "reports" / run / "metrics.jsonl")
    return [int(row["step"]) for row in rows if "train/loss" in row]


def _tracked(config: Config, run_id: str | None) -> tuple[str, list[int], dict[str, str]]:
    client = MlflowClient(resolve_tracking_uri(tracking_address(config))[0])
    assert run_id is not None
    run = client.get_run(run_id)
    steps = [metric.step for metric in client.get_metric_history(run_id, "train/loss")]
    return run.info.status, sorted(steps), run.data.tags


@pytest.mark.parametrize("algorithm", [pytest.param("baseline-mtp", marks=pytest.mark.slow), "critic-wmtp"])
def test_a_branch_leaves_the_run_it_comes_from_alone(algorithm: str, tmp_path: Path) -> None:
    config = _config(tmp_path)
    first = _train(config, _recipe(4, algo=algorithm), "first")
    before = (tmp_path / "reports/first/metrics.jsonl").read_bytes()
    branch = _train(config, _recipe(6, algo=algorithm), "branch", f"{tmp_path}/models/first/step-2")

    assert branch.mlflow_run_id != first.mlflow_run_id
    assert _tracked(config, first.mlflow_run_id)[:2] == ("FINISHED", [1, 2, 3, 4])
    status, steps, tags = _tracked(config, branch.mlflow_run_id)
    assert (status, steps) == ("FINISHED", [3, 4, 5, 6])
    assert tags["branch_of"] == f"{tmp_path}/models/first/step-2"
    assert (tmp_path / "reports/first/metrics.jsonl").read_bytes() == before
    assert _steps(tmp_path, "branch") == [3, 4, 5, 6]
    stores = {name: LocalStore(tmp_path / "models" / name) for name in ("first", "branch")}
    assert [info.step for info in list_checkpoints(stores["first"])] == [2, 4]
    assert [info.step for info in list_checkpoints(stores["branch"])] == [4, 6]


def test_a_run_of_the_same_name_elsewhere_is_another_run(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    _train(_config(here), _recipe(2), "run")
    _train(_config(there), _recipe(4), "run")
    with pytest.raises(UserInputError, match=r"already has checkpoints in .*/there/models/run"):
        _train(_config(there), _recipe(6), None, f"{here}/models/run")
    assert _steps(there, "run") == [1, 2, 3, 4]
    _train(_config(tmp_path / "new"), _recipe(4), None, f"{here}/models/run")
    assert _steps(here, "run") == [1, 2]
    assert _steps(tmp_path / "new", "run") == [3, 4]


def test_what_the_process_before_saved_while_this_one_waited_is_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = _config(tmp_path), tmp_path / "models/run"
    _train(config, _recipe(4), "run")
    last = tmp_path / "step-4"
    (run / "step-4").rename(last)
    has_lock = threading.Event()

    def save_late() -> None:
        with LocalStore(run).only_writer():
            has_lock.set()
            while "going on from" not in caplog.text:
                time.sleep(0.05)
            time.sleep(1.0)
            last.rename(run / "step-4")

    caplog.set_level(logging.INFO, "wmtp")
    before = threading.Thread(target=save_late)
    before.start()
    has_lock.wait()
    _train(config, _recipe(6), None, str(run))
    before.join()
    assert f"going on from {run}/step-2" in caplog.text
    assert f"going on from {run}/step-4" in caplog.text
    assert _steps(tmp_path, "run") == [1, 2, 3, 4, 5, 6]


def test_outputs_on_s3_have_folders_of_their_own_on_this_machine(tmp_path: Path) -> None:
    s3 = {"fallback_dir": str(tmp_path / "fallback"), "endpoint_url": "http://127.0.0.1:9"}
    places = {"output": "s3://one/a", "work": str(tmp_path / "work")}
    config = _config(tmp_path, paths=places, s3=s3)
    other = _config(tmp_path, paths={**places, "output": "s3://one/b"}, s3=s3)
    paths, other_paths = run_paths(config, "run"), run_paths(other, "run")
    assert paths.report == tmp_path / "work/one/a/reports/run"
    assert other_paths.report == tmp_path / "work/one/b/reports/run"
    fallback, other_fallback = (
        open_fallback_store(c, p.run_uri) for c, p in ((config, paths), (other, other_paths))
    )
    assert fallback is not None
    assert other_fallback is not None
    assert fallback.uri() == str(tmp_path / "fallback/one/a/models/run")
    assert fallback.uri() != other_fallback.uri()


def test_a_new_run_is_refused_where_one_has_checkpoints_in_the_fallback_or_a_finished_model(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path / "out")
    paths = run_paths(config, "run")
    refuse_existing_run(config, paths)
    paths.export.mkdir(parents=True)
    with pytest.raises(UserInputError, match="already has a finished model"):
        refuse_existing_run(config, paths)
    paths.export.rmdir()
    save_checkpoint(LocalStore(paths.checkpoints), 1, tensors={}, state={})
    with pytest.raises(UserInputError, match="already has checkpoints"):
        refuse_existing_run(config, paths)


def test_what_a_failed_first_attempt_left_does_not_get_into_the_run(tmp_path: Path) -> None:
    left = tmp_path / "models/run/tokenizer"
    left.mkdir(parents=True)
    (left / "tokenizer.json").write_text("of another model")
    _train(_config(tmp_path), _recipe(2), "run")
    assert "of another model" not in (left / "tokenizer.json").read_text()


def test_a_longer_schedule_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = _recipe(2)
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"scheduler": "cosine"})})
    _train(_config(tmp_path), recipe, "run")
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 4})})
    _train(_config(tmp_path), longer, None, f"{tmp_path}/models/run")
    assert "follows the cosine schedule of the new length" in caplog.text


def test_a_full_disk_after_training_is_one_message_with_how_to_go_on() -> None:
    stage = RunStage()
    stage.trained("/runs/models/run/step-8", "/runs/models/run")
    with pytest.raises(OutputError) as caught, stage.explained():
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/models/run/final")
    assert str(caught.value) == (
        "/runs/models/run/final: No space left on device\n  remedy: check the free space, the limits and the "
        "permissions there, then go on with --resume /runs/models/run"
    )
    with pytest.raises(ConnectionResetError), stage.explained():
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_an_output_that_cannot_be_a_folder_is_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    configs = Path(__file__).parents[1] / "configs"
    settings = ["--config", str(configs / "config.local_test.yaml")]
    settings += ["--recipe", str(configs / "recipe.mtp_baseline.yaml")]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *settings, "--set", f"paths.output={tmp_path}/file/out"])
    assert stopped.value.code in (1, 2)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert f"{tmp_path}/file" in printed
    assert "remedy:" in printed
