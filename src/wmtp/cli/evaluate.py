"""`wmtp eval`: evaluate a checkpoint."""

from __future__ import annotations

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


def evaluate(
    config: ConfigOption,
    recipe: RecipeOption,
    checkpoint: Annotated[
        str,
        typer.Option(help="Run folder, step-N folder, export, model folder or hub id.", show_default=False),
    ],
    datasets: Annotated[
        str | None, typer.Option(help="Benchmarks, separated by commas; default: eval.datasets.")
    ] = None,
    types: Annotated[
        str | None, typer.Option(help="Evaluation types, separated by commas; default: eval.types.")
    ] = None,
    run_name: RunNameOption = None,
    tags: TagsOption = None,
    dry_run: DryRunOption = False,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
    unsafe_execution: UnsafeOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Evaluate a run directory, a step, an export or a model."""
    from wmtp.cli.summary import print_evaluation, print_settings
    from wmtp.settings import load_settings

    chosen = [
        f"eval.{key}=[{value}]"
        for key, value in (("datasets", datasets), ("types", types))
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
