"""`wmtp validate`: check settings, paths, tokenizers and shapes without training."""

from __future__ import annotations

from wmtp.cli.options import ConfigOption, RecipeOption, SetOption, TrustOption


def validate(
    config: ConfigOption,
    recipe: RecipeOption,
    overrides: SetOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Check config, recipe, paths, tokenizers, shapes and memory, on a CPU; nothing is written."""
    from wmtp.cli.summary import print_validation
    from wmtp.settings import load_settings

    settings = load_settings(config, recipe, overrides=overrides or [])

    from wmtp.pipelines import RunOptions, validate_settings

    print_validation(validate_settings(*settings, RunOptions(trust_remote_code=trust_remote_code)))
