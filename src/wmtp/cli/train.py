"""`wmtp train`: train, then evaluate on every configured benchmark and report."""

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


def train(
    config: ConfigOption,
    recipe: RecipeOption,
    run_name: RunNameOption = None,
    tags: TagsOption = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; the same as --set train.max_steps=N.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Run, step-N folder (local or s3://) or runs:/<MLflow id> to go on from."),
    ] = None,
    dry_run: DryRunOption = False,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
    unsafe_execution: UnsafeOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train, then evaluate on every configured benchmark and report."""
    from wmtp.cli.summary import print_dry_run, print_settings, print_training
    from wmtp.settings import load_settings

    steps = [] if max_steps is None else [f"train.max_steps={max_steps}"]
    settings = load_settings(config, recipe, overrides=[*(overrides or []), *steps])
    if verbose:
        print_settings(*settings)

    # After the settings are known to be good, because torch takes seconds to import.
    from wmtp.pipelines import RunOptions, run_training_pipeline

    options = RunOptions(
        run_name=run_name,
        tags=split_tags(tags),
        unsafe_execution=unsafe_execution,
        trust_remote_code=trust_remote_code,
    )
    outputs = run_training_pipeline(*settings, dry_run=dry_run, resume_checkpoint=resume, options=options)
    if outputs.dry_run is not None:
        print_dry_run(outputs.dry_run)
    else:
        print_training(outputs)


if __name__ == "__main__":
    from wmtp.cli.app import run_command

    run_command(train)
