"""`wmtp migrate`: configs of the older layout, its cache folder, access to S3, and old `.pt` checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wmtp.cli.options import TrustOption

if TYPE_CHECKING:
    from wmtp.pipelines.doctor_s3 import Probe
    from wmtp.pipelines.migrate_cache import CacheFolder
    from wmtp.pipelines.migrate_config import MigratedConfig

_KIND_STYLES = {"kept": "dim", "moved": "", "changed": "yellow", "dropped": "yellow", "disabled": "red"}


def migrate(
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "--config", "-c", help="Config of the older layout; may be repeated.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Where the new config, or the model folder, goes; default: <name>.new.yaml beside the old.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what is at that place; a replaced config is kept as a copy."),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Cache folder of the older layout to remove; default: paths.cache of the old config.",
            show_default=False,
        ),
    ] = None,
    keep_cache: Annotated[
        bool, typer.Option("--keep-cache", help="Leave the old cache folder alone.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove the cache folder without asking.")] = False,
    check_s3: Annotated[
        bool, typer.Option("--check-s3/--no-check-s3", help="Try to list, read and write what is on S3.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write and remove nothing.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="Old .pt checkpoint to turn into a model folder.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="With --checkpoint: the model it was trained from.", show_default=False),
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Turn the older layout into the present one: config, cache folder, S3 access, old .pt checkpoints."""
    from wmtp.exceptions import UserInputError

    configs = config or []
    if checkpoint is not None:
        if configs or cache is not None:
            raise UserInputError(
                "--checkpoint converts one file, and goes with --base and --output alone",
                remedy="migrate configs and the cache folder in a call of their own",
            )
        _migrate_checkpoint(checkpoint, base, output, force=force, dry_run=dry_run, trust=trust_remote_code)
        return
    if not configs and cache is None:
        raise UserInputError(
            "there is nothing to migrate",
            remedy="give --config configs/config.local.yaml (or config.vessl.yaml), --cache .cache, or "
            "--checkpoint old.pt --base <model> --output <folder>",
        )
    if output is not None and len(configs) > 1:
        raise UserInputError(
            f"--output is one file, and {len(configs)} configs were given", remedy="migrate them one by one"
        )
    _Migration(Console(), force=force, yes=yes, dry_run=dry_run).run(
        configs,
        output=None if output is None else _local_file(output),
        cache=cache,
        keep_cache=keep_cache,
        check_s3=check_s3,
    )


class _Migration:
    """The three parts, with what they print."""

    def __init__(self, console: Console, *, force: bool, yes: bool, dry_run: bool) -> None:
        self.console = console
        self.force = force
        self.yes = yes
        self.dry_run = dry_run

    def run(
        self,
        configs: list[Path],
        *,
        output: Path | None,
        cache: Path | None,
        keep_cache: bool,
        check_s3: bool,
    ) -> None:
        """Convert every config before anything is written or removed: a mistake leaves all as it was."""
        from wmtp.pipelines.migrate_config import migrate_config
        from wmtp.pipelines.migrate_write import place_of

        migrated = [migrate_config(path) for path in configs]
        places = [
            None if each.is_current else place_of(each.source, output, force=self.force) for each in migrated
        ]
        for each, place in zip(migrated, places, strict=True):
            self._write(each, place)
        if not keep_cache:
            self._remove_caches(migrated, cache)
        is_well = True
        for each in migrated if check_s3 else []:
            is_well = self._check_s3(each) and is_well
        if not is_well:
            raise typer.Exit(1)

    def _write(self, migrated: MigratedConfig, place: Path | None) -> None:
        from wmtp.pipelines.migrate_write import save_config

        if place is None:
            self._say(f"{migrated.source} is in the present layout already; nothing to do", "green")
            return
        _print_keys(self.console, migrated)
        for warning in migrated.warnings:
            self._say(f"warning: {warning}", "yellow")
        if self.dry_run:
            self._say(f"dry run: {place} would be written:", "bold")
            self.console.print(Text(migrated.text), soft_wrap=True)
            return
        saved = save_config(migrated.text, place, source=migrated.source)
        if saved.backup is not None:
            self._say(f"what was at {place} is now {saved.backup}", "bold")
        self._say(f"wrote {saved.path}; {migrated.source} is as it was", "bold")
        self._say(f"next: wmtp validate --config {saved.path} --recipe <recipe>")

    # ---------------------------------------------------------------- the cache folder

    def _remove_caches(self, migrated: list[MigratedConfig], given: Path | None) -> None:
        from wmtp.exceptions import UserInputError
        from wmtp.pipelines.migrate_cache import inspect_cache

        named = [] if given is not None else [Path(each.cache) for each in migrated if each.cache is not None]
        for folder in dict.fromkeys(named if given is None else [given]):
            if given is None and not folder.exists():
                self._say(f"the old cache folder {folder} is not there; nothing to remove")
                continue
            unknown = [key for each in migrated for key in each.unset if key.startswith("paths.")]
            if unknown:
                self._say(
                    f"the old cache folder {folder} stays: where {unknown[0]} is, is not known", "yellow"
                )
                continue
            try:
                found = inspect_cache(
                    folder,
                    is_configured=given is None,
                    configs=[each.settings for each in migrated],
                    keep=[each.source for each in migrated],
                )
            except UserInputError as error:
                if given is not None:
                    raise
                # The config is written; that the folder stays is said and is no failure.
                self._say(f"warning: {error.message} ({error.remedy})", "yellow")
                continue
            self._remove_cache(found)

    def _remove_cache(self, found: CacheFolder) -> None:
        from wmtp.pipelines.doctor_check import size_text
        from wmtp.pipelines.migrate_cache import remove_cache

        self._say(
            f"old cache folder {found.path}: {size_text(found.num_bytes)} in {found.num_files} files", "bold"
        )
        for kind, (files, size) in found.kinds.items():
            self._say(f"  {kind}: {size_text(size)} in {files} files")
        if self.dry_run:
            self._say("dry run: it would be removed")
            return
        if not self.yes and not sys.stdin.isatty():
            self._say("it stays: nobody can be asked here; remove it with --yes", "yellow")
            return
        if not self.yes and not typer.confirm("remove this folder and all it holds?", default=False):
            self._say("it stays")
            return
        remove_cache(found)
        self._say(f"removed {found.path}: {size_text(found.num_bytes)} are free", "green")

    # ---------------------------------------------------------------- S3

    def _check_s3(self, migrated: MigratedConfig) -> bool:
        """Print a line for each thing on S3; whether all of them work."""
        from wmtp.cli.doctor import print_checks
        from wmtp.pipelines.doctor_check import run_bounded
        from wmtp.pipelines.doctor_s3 import check_s3, uses_s3

        if migrated.unset:
            self._say(
                f"access to S3 is not tried: {', '.join(migrated.unset)} need variables, see above", "yellow"
            )
            return True
        if not uses_s3(migrated.settings):
            self._say(f"access to S3: not tried, {migrated.source} names nothing there")
            return True
        probe: Probe = "none" if self.dry_run else "results"
        self._say(f"access to S3 as {migrated.source} has it:", "bold")
        checks = run_bounded("s3", "access", lambda: check_s3(migrated.settings, probe=probe), limit_s=90.0)
        print_checks(self.console, iter(checks))
        return all(check.status != "broken" for check in checks)

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)


def _local_file(text: str) -> Path:
    from wmtp.exceptions import UserInputError
    from wmtp.storage import PathResolver

    if PathResolver().resolve(text)[0] not in ("local", "hub"):
        raise UserInputError(
            f"output {text} is not a local file", remedy="give a file, and copy it from there"
        )
    return Path(text)


def _print_keys(console: Console, migrated: MigratedConfig) -> None:
    """What became of each key: a table on a terminal, else one line each, which is never cut."""
    console.print(Text(f"{migrated.source}:", style="bold"), soft_wrap=True)
    if not console.is_terminal:
        for row in migrated.keys:
            note = f" ({row.note})" if row.note else ""
            line = f"  {row.kind:<8} {row.old or '(not given)'} -> {row.new or 'none'}{note}"
            console.print(Text(line), soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("old key", "new key", "", "note"):
        table.add_column(name, overflow="fold")
    for row in migrated.keys:
        kind = Text(row.kind, style=_KIND_STYLES[row.kind])
        table.add_row(Text(row.old or "(not given)"), Text(row.new or "none"), kind, Text(row.note))
    console.print(table)


def _migrate_checkpoint(
    checkpoint: str, base: str | None, output: str | None, *, force: bool, dry_run: bool, trust: bool
) -> None:
    from wmtp.exceptions import UserInputError

    if base is None or output is None:
        missing = " and ".join(
            name for name, value in (("--base", base), ("--output", output)) if value is None
        )
        raise UserInputError(
            f"--checkpoint needs {missing}",
            remedy="a .pt file does not say what model it is: give the one it was trained from, and a folder",
        )
    from wmtp.pipelines.migrate_checkpoint import convert_state_dict_file

    with Console(stderr=True).status(f"reading {checkpoint} ..."):
        done = convert_state_dict_file(
            checkpoint, base, output, force=force, dry_run=dry_run, trust_remote_code=trust
        )
    console = Console()

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    heads = "1 head" if done.horizon == 1 else f"{done.horizon} heads ({done.head})"
    verb = "dry run: would convert" if dry_run else "converted"
    say(f"{verb} {done.source} to {done.folder}", "bold")
    say(
        f"  {done.num_parameters:,} parameters in {done.dtype}, {heads}; configuration and tokenizer of "
        f"{done.base}"
    )
    if done.left_out:
        say(f"note: left out, as it is no part of a model: {', '.join(done.left_out)}", "yellow")
    for note in done.notes:
        say(f"note: {note}", "yellow")
    say("next:")
    say(f"  wmtp eval --config <config> --recipe <recipe> --checkpoint {done.folder}")
