"""A run tracked on S3 from the command line: checkpoints by run id, resume, and the registered value head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from test_pipelines_matrix import run_cli, train_arguments

from s3_server import S3Server
from wmtp.exceptions import ModelLoadError, StorageMissingError
from wmtp.pipelines.critic import local_value_head
from wmtp.settings import Config
from wmtp.storage import S3Manager

pytestmark = pytest.mark.s3


def _config(s3_server: S3Server, prefix: str) -> dict[str, str]:
    return {
        "mlflow.tracking_uri": prefix,
        "s3.endpoint_url": s3_server.endpoint_url,
        "s3.access_key_id": s3_server.access_key,
        "s3.secret_access_key": s3_server.secret_key,
    }


@pytest.mark.slow
def test_a_run_on_s3_is_resumed_by_its_id_and_its_value_head_used_by_another(
    s3_server: S3Server, tmp_path: Path
) -> None:
    prefix = f"s3://{s3_server.bucket}/{tmp_path.name}"
    storage = S3Manager(s3_server.settings)

    def run(*more: str) -> None:
        where = [
            part for key, value in _config(s3_server, prefix).items() for part in ("--set", f"{key}={value}")
        ]
        constant = ["--set", "optim.scheduler=constant", "--set", "train.save_every_steps=1"]
        assert run_cli(*train_arguments("critic_wmtp", tmp_path, *where, *constant, *more)) == 0

    def client() -> MlflowClient:
        path = tmp_path / "downloaded.db"
        path.write_bytes(storage.read_bytes(f"{prefix}/mlflow.db")[0])
        return MlflowClient(tracking_uri=f"sqlite:///{path}")

    run("--run-name", "first", "--max-steps", "2")
    experiment = client().get_experiment_by_name("mtp/critic-wmtp/microcode").experiment_id
    (run_id,) = [found.info.run_id for found in client().search_runs([experiment])]
    run("--resume", f"runs:/{run_id}", "--max-steps", "3")

    (found,) = client().search_runs([experiment])
    assert found.info.run_id == run_id
    assert found.info.status == "FINISHED"
    for key in ("train/loss", "train/weight_mean", "train/mfu"):
        assert [entry.step for entry in client().get_metric_history(run_id, key)] == [1, 2, 3]
    assert {key for key in found.data.tags if key.startswith("checkpoints/")} == {
        f"checkpoints/step_{step}" for step in (1, 2, 3)
    }
    assert found.data.params["train.algo"] == "critic-wmtp"
    assert s3_server.secret_key not in str(found.data.params)
    artifacts = f"{prefix}/artifacts/{run_id}/artifacts/"
    names = {stored.key.removeprefix(artifacts) for stored in storage.list_objects(artifacts)}
    assert {"config.yaml", "recipe.yaml", "report.html"} <= names
    assert {name for name in names if name.startswith("critic/")} == {
        "critic/value_head/value_head.json",
        "critic/value_head/value_head.safetensors",
    }

    # Another run starts from the registered value head, and trains none.
    assert found.data.tags["model.wmtp_critic_value_head"] == "models:/wmtp_critic_value_head/1"
    value_head = ["--set", "critic.value_head=models:/wmtp_critic_value_head/1"]
    run("--run-name", "second", "--max-steps", "1", *value_head)
    final = load_file(tmp_path / "models/first/critic/value_head_final/value_head.safetensors")
    used = load_file(tmp_path / "models/second/critic/value_head/value_head.safetensors")
    assert final.keys() == used.keys()
    assert all(torch.equal(final[name], used[name]) for name in final)


def test_a_value_head_is_had_from_s3_for_as_long_as_it_is_loaded(s3_server: S3Server, tmp_path: Path) -> None:
    config = Config.model_validate({"s3": s3_server.settings, "paths": {"output": str(tmp_path)}})
    storage = S3Manager(s3_server.settings)
    address = f"s3://{s3_server.bucket}/{tmp_path.name}/head"
    for name in ("value_head.json", "value_head.safetensors", "something-large"):
        storage.write_bytes(f"{address}/{name}", name.encode())
    with local_value_head(config, address) as folder:
        assert folder is not None
        assert {file.name: file.read_text() for file in folder.iterdir()} == {
            name: name for name in ("value_head.json", "value_head.safetensors")
        }
    assert not folder.exists()
    with pytest.raises(StorageMissingError, match="nowhere"), local_value_head(config, f"{address}/nowhere"):
        pass
    with pytest.raises(ModelLoadError, match="models:/none/1"), local_value_head(config, "models:/none/1"):
        pass
    with local_value_head(config, None) as nothing:
        assert nothing is None
