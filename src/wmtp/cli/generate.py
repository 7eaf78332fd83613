"""`wmtp generate`: write on from a prompt, plain or with the heads' drafts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from wmtp.cli.options import TrustOption

if TYPE_CHECKING:
    from wmtp.pipelines.generation import GenerationOutputs


def generate(
    checkpoint: Annotated[
        str,
        typer.Option(help="Run folder, step-N folder, export, model folder or hub id.", show_default=False),
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the prompt; - is standard input.", show_default=False)
    ] = None,
    speculative: Annotated[
        bool, typer.Option("--speculative", help="Let the heads draft: the same text in fewer forwards.")
    ] = False,
    tree: Annotated[
        str | None,
        typer.Option(help="Alternatives that heads 1, 2, ... draft, such as 3,2,1; default: one each."),
    ] = None,
    draft_from: Annotated[
        str | None,
        typer.Option(
            help="Dataset such as the training data: only tokens it writes are drafted. Saves time where the "
            "vocabulary is large for the model.",
            show_default=False,
        ),
    ] = None,
    draft_vocabulary: Annotated[
        int | None, typer.Option(help="Draft only its so many most frequent tokens.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Smallest set of tokens of this probability; 1 is off.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Tokens at least this many times as likely as the likeliest; 0 is off.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends the text; may be repeated.", show_default=False)
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write on from a prompt; the text goes to standard output as it comes, figures to standard error."""
    from wmtp.pipelines.generation import GenerationOptions, run_generation_pipeline

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        speculative=speculative,
        widths=None if tree is None else _read_widths(tree),
        draft_from=draft_from,
        draft_vocabulary=draft_vocabulary,
        trust_remote_code=trust_remote_code,
    )

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    outputs = run_generation_pipeline(
        checkpoint, _read_prompt(prompt, prompt_file), options=options, on_text=show
    )
    show("\n")
    print_figures(outputs, speculative=speculative)


def print_figures(outputs: GenerationOutputs, *, speculative: bool) -> None:
    """Tell tokens, speed, and how far the drafts were right."""
    counts = outputs.counts
    parts = [
        f"{counts.num_tokens} tokens in {outputs.seconds:.2f} s",
        f"{counts.num_tokens / max(outputs.seconds, 1e-9):.1f} tokens/s",
        f"ended by {outputs.generation.finish_reason}",
    ]
    if speculative:
        shares = " ".join(f"{share:.2f}" for share in counts.acceptance[1:]) or "none"
        parts += [
            f"{counts.tokens_per_forward:.2f} tokens a forward",
            f"drafts accepted, by head: {shares}",
        ]
    Console(stderr=True).print(Text("; ".join(parts), style="dim"), soft_wrap=True)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    from wmtp.exceptions import UserInputError

    if (prompt is None) == (file is None):
        raise UserInputError(
            "give one of --prompt and --prompt-file", remedy='such as --prompt "def add(a, b):"'
        )
    if file is None:
        text = prompt or ""
    elif str(file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserInputError(
                f"{file} cannot be read: {error}", remedy="give a text file in UTF-8"
            ) from error
    if not text:
        raise UserInputError("the prompt is empty", remedy="give at least one character")
    return text


def _read_widths(tree: str) -> list[int]:
    from wmtp.exceptions import UserInputError

    try:
        return [int(width) for width in tree.split(",")]
    except ValueError as error:
        raise UserInputError(f"--tree is {tree!r}", remedy="give whole numbers, such as 3,2,1") from error
