"""What became of every key of the older layout: its new name, or where the matter is settled now.

The older layout went through three forms, all of which are known here: `storage.mode` with
`paths.models.base_local` and `base_s3`; the same with `paths.models.base`; and `s3_auth` with addresses in
place of a mode.
"""

from __future__ import annotations

import fnmatch

RENAMED = {
    "storage.bucket": "s3.bucket",
    "storage.region": "s3.region",
    "storage.endpoint_url": "s3.endpoint_url",
    **{
        f"{section}.{name}": f"s3.{new}"
        for section in ("storage.s3", "s3_auth")
        for name, new in {
            "bucket": "bucket",
            "default_bucket": "bucket",
            "region": "region",
            "endpoint_url": "endpoint_url",
            "endpoint": "endpoint_url",
            "access_key_id": "access_key_id",
            "secret_access_key": "secret_access_key",
            "access_key": "access_key_id",
            "secret_key": "secret_access_key",
            "session_token": "session_token",
        }.items()
    },
    "devices.compute_backend": "devices.accelerator",
    "devices.mixed_precision": "devices.precision",
    "devices.fsdp.enabled": "devices.strategy",
}
"""Old key -> the key that holds the same thing."""

OUTPUT_KEYS = (
    "paths.output",
    "paths.output_dir",
    "paths.outputs",
    "paths.checkpoints.base_path",
    "paths.checkpoints",
    "storage.local.output",
    "storage.local.output_dir",
    "storage.local.base_path",
    "storage.local.checkpoints",
)
"""Keys that said where results go, the first that is set wins."""

PLACES = (
    *(f"paths.models.{name}" for name in ("base", "ref", "rm")),
    *(f"paths.datasets.{name}" for name in ("mbpp", "contest", "humaneval", "custom", "microcode")),
)
"""Models and datasets; the older layout had `<key>_local` and `<key>_s3` besides."""

CACHE_KEYS = ("paths.cache", "cache", "storage.cache", "storage.local.cache", "storage.local.cache_dir")
"""Keys that named the old cache folder."""

_DROPPED = {
    "project": "no longer used; name a run with --run-name, mark it with --tags",
    "seed": "belongs in the recipe: train.seed",
    "log_interval": "belongs in the recipe: train.log_every_steps",
    "storage.mode": "no longer needed: each path says by itself whether it is local or s3://",
    "storage.prefix": "no longer used; write it into the s3:// addresses",
    "storage.s3.prefix": "now part of the s3:// addresses",
    "storage.s3.profile": "set AWS_PROFILE in the environment",
    "s3_auth.profile": "set AWS_PROFILE in the environment",
    "s3_auth.prefix": "now part of the s3:// addresses",
    "hf_auth.*": "set HF_TOKEN in the environment",
    "paths.checkpoints.save_interval": "belongs in the recipe: train.save_every_steps",
    "paths.checkpoints.keep_last": "belongs in the recipe: train.keep_last",
    "paths.checkpoints.save_final": "no longer needed: a finished run always leaves its model in `final`",
    "checkpoint.save_interval": "belongs in the recipe: train.save_every_steps",
    "checkpoint.keep_last_n": "belongs in the recipe: train.keep_last",
    "checkpoint.*": "checkpoints go below paths.output",
    "mlflow.experiment": "experiments are named mtp/<algorithm>/<dataset>",
    "launcher.distributed.*": "processes are started with the right addresses by themselves",
    "devices.distributed.*": "processes are started with the right addresses by themselves",
    "launcher.resources.*": "belongs in the job file of the cluster",
    "devices.device_ids": "set CUDA_VISIBLE_DEVICES in the environment",
    "devices.num_proc": "belongs in the recipe: data.train.num_workers",
    "devices.fsdp.*": "no longer set by hand; devices.strategy chooses how a model is shared",
    "runtime.num_workers": "belongs in the recipe: data.train.num_workers",
    "runtime.mixed_precision": "set devices.precision",
    "runtime.*": "no longer used",
    "loaders.*": "no longer used: models and data are told by their files",
    **dict.fromkeys(CACHE_KEYS, "there is no cache folder any more"),
    **dict.fromkeys(
        (
            f"{name}.*"
            for name in ("train", "model", "data", "loss", "optim", "eval", "critic", "rho1", "run")
        ),
        "belongs in a recipe; see the recipes in configs/",
    ),
    **dict.fromkeys(
        ("pretrain.*", "batching.*", "recipe.*"), "belonged in a recipe; see the recipes in configs/"
    ),
}

RECIPE_SECTIONS = ("train", "model", "data", "loss", "optim", "eval", "critic", "rho1")
"""Sections of recipes, old and new."""


def explain_dropped(key: str) -> str | None:
    """Where the matter of an old key without a successor is settled now; None for a key that is not known."""
    exact = _DROPPED.get(key)
    if exact is not None:
        return exact
    return next((why for pattern, why in _DROPPED.items() if fnmatch.fnmatchcase(key, pattern)), None)
