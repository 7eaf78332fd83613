"""A run with models, data, output and tracking on S3: its home is read-only, the hub away, `/tmp` small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from s3_server import S3Server
from tiny_llama import write_llama
from wmtp.execution.layout import find_bubblewrap
from wmtp.storage import S3Manager

# Less than the model has: a copy of it beside the places that a config names would not fit.
_TMP_BYTES = 8 * 2**20


def _upload_model(manager: S3Manager, uri: str, folder: Path) -> int:
    write_llama(folder, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
    for file in folder.iterdir():
        manager.write_bytes(f"{uri}/{file.name}", file.read_bytes())
    return (folder / "model.safetensors").stat().st_size


def _run(home: Path, work: Path, *arguments: str) -> str:
    """`wmtp` in a process that can write to `work` and to a small `/tmp` of its own, and nowhere else."""
    command = [str(find_bubblewrap()), "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc"]
    command += ["--size", str(_TMP_BYTES), "--tmpfs", "/tmp", "--ro-bind", str(home), str(home)]
    command += ["--bind", str(work), str(work), "--chdir", str(home)]
    package = str(Path(__file__).parents[2] / "src")
    environment = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": package,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command += ["--ro-bind", package, package, "--ro-bind", sys.prefix, sys.prefix]
    done = subprocess.run(
        [*command, "--", str(Path(sys.executable).with_name("wmtp")), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stderr + done.stdout


def test_all_is_read_and_written_where_the_config_says(s3_server: S3Server, tmp_path: Path) -> None:
    manager = S3Manager(s3_server.settings)
    root = f"s3://{s3_server.bucket}/no-cache"
    torch.manual_seed(0)
    num_bytes = _upload_model(manager, f"{root}/base", tmp_path / "model")
    assert num_bytes > 1.5 * _TMP_BYTES
    rows = "".join(
        json.dumps({"prompt": f"add {n}\n", "completion": f"def f(x): return x + {n}"}) + "\n"
        for n in range(30)
    )
    manager.write_bytes(f"{root}/rows.jsonl", rows.encode())
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    config = {
        "paths": {
            "models": {"base": f"{root}/base", "ref": f"{root}/base"},
            "datasets": {"custom": f"{root}/rows.jsonl"},
            "output": f"{root}/out",
            "work": str(work),
        },
        "s3": {
            "endpoint_url": s3_server.endpoint_url,
            "access_key_id": s3_server.access_key,
            "secret_access_key": s3_server.secret_key,
        },
        "mlflow": {"tracking_uri": f"{root}/mlflow"},
        "devices": {"accelerator": "cpu", "precision": "fp32", "num_threads": 1},
    }
    recipe = {
        "train": {"algo": "rho1-wmtp", "max_steps": 2, "save_every_steps": 1},
        "model": {"mtp": {"horizon": 2}},
        "data": {"train": {"sources": ["custom"], "batch_size": 2, "max_length": 64}},
        "optim": {"scheduler": "constant"},
        "eval": {"datasets": ["microcode"], "types": ["meta-mtp"], "max_problems": 2, "max_new_tokens": 8},
    }
    for name, content in (("config.yaml", config), ("recipe.yaml", recipe)):
        (work / name).write_text(yaml.safe_dump(content))
    files = ("--config", str(work / "config.yaml"), "--recipe", str(work / "recipe.yaml"))

    _run(home, work, "train", *files, "--run-name", "run")
    _run(home, work, "train", *files, "--resume", f"{root}/out/models/run", "--max-steps", "3")
    _run(home, work, "eval", *files, "--checkpoint", f"{root}/out/models/run/step-3", "--run-name", "again")

    assert list(home.iterdir()) == []
    written = {found.key.removeprefix(f"{root}/") for found in manager.list_objects(root)}
    assert {"out/models/run/final/model.safetensors", "out/reports/run/report.html"} <= written
    assert any(name.startswith("mlflow/runs/") for name in written)
    # What stands in the visible work folder is what was copied to S3: the export and the reports.
    made = work / s3_server.bucket / "no-cache" / "out"
    assert {path.name for path in work.iterdir()} == {"config.yaml", "recipe.yaml", s3_server.bucket}
    assert {path.name for path in made.iterdir()} == {"models", "reports"}
    assert {path.name for path in (made / "models" / "run").iterdir()} <= {"final", "tokenizer"}
