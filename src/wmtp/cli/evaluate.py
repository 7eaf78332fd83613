"""`wmtp eval`: evaluate a checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from wmtp.cli.options import (
    ConfigOption,
    DryRunOption,
    RecipeOption,
    RunNameOption,
    SetOption,
    TagsOption,
    TrustOption,
    UnsafeOption,
    VerboseOption,
    split_tags,
)
from wmtp.exceptions import UserInputError


def evaluate(
    config: ConfigOption,
    recipe: RecipeOption,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Run folder, step-N folder, export, .pt state dict, runs:/<MLflow id>, model folder, hub id "
            "or s3:// address.",
            show_default=False,
        ),
    ],
    datasets: Annotated[
        str | None,
        typer.Option(help="Benchmarks or files, separated by commas; default: eval.datasets."),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(
            help="meta-mtp, exact-match, perplexity, self-speculation, token-accuracy, separated by commas; "
            "default: eval.types."
        ),
    ] = None,
    run_name: RunNameOption = None,
    tags: TagsOption = None,
    dry_run: DryRunOption = False,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
    unsafe_execution: UnsafeOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Evaluate a run directory, a step, an export, a state dict or a model.

    An evaluation that was interrupted goes on where it was when the same command is given again.
    """
    from wmtp.cli.summary import print_evaluation, print_settings
    from wmtp.settings import load_settings

    chosen = [
        f"eval.{key}={json.dumps(_split(option, value))}"
        for key, option, value in (("datasets", "--datasets", datasets), ("types", "--types", types))
        if value is not None
    ]
    settings = load_settings(config, recipe, overrides=[*(overrides or []), *chosen])
    if verbose:
        print_settings(*settings)

    from wmtp.pipelines import RunOptions, run_evaluation_pipeline

    options = RunOptions(
        run_name=run_name,
        tags=split_tags(tags),
        unsafe_execution=unsafe_execution,
        trust_remote_code=trust_remote_code,
    )
    outputs = run_evaluation_pipeline(*settings, checkpoint, dry_run=dry_run, options=options)
    print_evaluation(outputs)


def _split(option: str, value: str) -> list[str]:
    """`a,b` as a list; a name that is given twice counts once.

    Raises:
        UserInputError: nothing is named.
    """
    names = list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if not names:
        raise UserInputError(f"{option} {value!r} names nothing", remedy="leave it out, or give names")
    return names
