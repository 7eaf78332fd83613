"""Recipe section `eval`: what is measured after training, and how programs are sampled and run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wmtp.settings.base import Ratio, Section, Seed, Text

EvalType = Literal["meta-mtp", "exact-match", "perplexity", "self-speculation", "token-accuracy"]


class EvalSettings(Section):
    """What is measured after training, and how programs are sampled and run."""

    datasets: list[Text] = Field(
        default=[], description="Names under paths.datasets to evaluate on; empty skips evaluation."
    )
    types: Annotated[list[EvalType], Field(min_length=1)] = Field(
        default=["meta-mtp"],
        description="Measurements; meta-mtp is pass@k of executed programs.",
    )
    k: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        default=[1, 10, 100],
        description="Values of k in pass@k; those above num_samples are left out.",
    )
    num_samples: int = Field(
        default=1, ge=1, description="Programs sampled for each problem and temperature."
    )
    temperatures: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = Field(
        default=[0.0], description="Sampling temperatures, one evaluation each; 0 is greedy."
    )
    top_p: Ratio = Field(
        default=1.0, description="Nucleus: smallest set of tokens with this probability; 1 is off."
    )
    top_k: int = Field(default=0, ge=0, description="Sample among this many likeliest tokens; 0 is off.")
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Sample among tokens at least this likely relative to the likeliest; 0 is off.",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Longest generated program, in tokens.")
    batch_size: int = Field(default=64, ge=1, description="Programs generated at once.")
    mbpp_shots: Literal[0, 3] = Field(
        default=0,
        description="MBPP prompt: 0 is a docstring, 3 the authors' with tasks 2, 3 and 4 solved before.",
    )
    max_problems: int | None = Field(
        default=None, ge=1, description="Most problems of each dataset; null takes all."
    )
    seed: Seed = Field(default=0, description="Seed of sampling.")
    timeout_s: float = Field(default=10.0, gt=0, description="Time one program may run, in seconds.")
    memory_mib: int = Field(default=512, ge=64, description="Memory one program may use, in MiB.")
    num_workers: int | None = Field(
        default=None, ge=1, description="Programs executed at once; null is the number of CPU cores."
    )
