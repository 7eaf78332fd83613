"""`wmtp export`: a checkpoint as a model folder that other programs load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wmtp.cli.options import TrustOption

if TYPE_CHECKING:
    from wmtp.pipelines.export import ExportOutputs


def export(
    checkpoint: Annotated[
        str,
        typer.Option(help="Run folder, step-N folder, export, model folder or hub id.", show_default=False),
    ],
    output: Annotated[str, typer.Option(help="Folder to write.", show_default=False)],
    format_name: Annotated[
        Literal["hf", "meta"],
        typer.Option("--format", help="Hugging Face, or Meta's native multi-token prediction layout."),
    ] = "hf",
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="Precision of the weights; auto keeps the checkpoint's."),
    ] = "auto",
    horizon: Annotated[
        int | None, typer.Option(help="Write the first N heads only; default: all.", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that is already in the output folder.")
    ] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a checkpoint as a model folder: weights, heads, tokenizer, generation config and model card."""
    from wmtp.pipelines.export import ExportOptions, run_export_pipeline

    options = ExportOptions(
        format=format_name, dtype=dtype, horizon=horizon, force=force, trust_remote_code=trust_remote_code
    )
    with Console(stderr=True).status(f"exporting {checkpoint} ..."):
        outputs = run_export_pipeline(checkpoint, output, options=options)
    print_export(outputs)


def print_export(outputs: ExportOutputs) -> None:
    """What was written, what it weighs, and how to go on."""
    console = Console()
    heads = "1 head (next token)" if len(outputs.offsets) == 1 else _heads_text(outputs)
    summary = f"{outputs.num_parameters:,} parameters in {outputs.dtype}, {heads}"
    _print(console, Text(f"exported {outputs.source} to {outputs.folder}", style="bold"))
    _print(console, Text(f"  {summary}"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, size in outputs.files.items():
        table.add_row(f"  {name}", _size_text(size))
    console.print(table)
    for note in outputs.notes:
        _print(console, Text(f"note: {note}", style="yellow"))
    _print(console, Text("load it:"))
    if outputs.format == "hf":
        _print(console, Text(f'  AutoModelForCausalLM.from_pretrained("{outputs.folder}")'))
    _print(console, Text(f'  MTPModel.from_pretrained("{outputs.folder}")   # with all heads'))
    _print(console, Text("next:"))
    _print(console, Text(f"  wmtp eval --config <config> --recipe <recipe> --checkpoint {outputs.folder}"))
    if outputs.format == "hf":
        _print(console, Text(f"  lm_eval --model hf --model_args pretrained={outputs.folder} --tasks <task>"))


def _heads_text(outputs: ExportOutputs) -> str:
    return f"{len(outputs.offsets)} heads ({outputs.head}) at offsets {', '.join(map(str, outputs.offsets))}"


def _size_text(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)
