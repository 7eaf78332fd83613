"""The model card: README.md of an exported model, for the Hugging Face hub and for people.

Front matter as the hub reads it (https://huggingface.co/docs/hub/model-cards): base model and data sets are
named there only where they are on the hub, since a folder's name could belong to somebody else's model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from wmtp.reporting.text import format_number, format_percent, visible

_PASS_AT = re.compile(r"^(?P<benchmark>.+)_pass_at_(?P<k>\d+)$")
# Measured on held-out data, or the loss a reader looks for; the rest of a run's numbers is in its report.
_SHOWN_METRICS = re.compile(
    r"^(train/loss|train/ce_head_\d+|val/.*|perplexity_head_\d+|token_accuracy_head_\d+|.*exact_match|"
    r"critic/(auc|explained_variance)|.*(acceptance|tokens_per_forward).*)$"
)
_ALGORITHMS = {
    "baseline-mtp": "every token weighs the same",
    "critic-wmtp": "tokens weighed by the change of a value function",
    "rho1-wmtp": "tokens weighed by their excess loss over a reference model",
    "mtp-weighted-ce": "tokens weighed by a scorer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a card says; what is not known is left out of it.

    Args:
        title: the model's name.
        layout: `hf`, or `meta` for the native layout.
        dtype: precision of the weights.
        num_parameters: of model and heads.
        head: form of heads 1..H-1.
        offsets: distance in tokens that each head predicts.
        base: name of the model it was made from.
        base_model: the base's hub id, where it has one.
        algorithm: key of the training algorithm; None for a model that was not trained.
        data: names of the training data.
        datasets: hub ids among them.
        steps: optimizer steps.
        recipe: settings of the run that are not defaults.
        metrics: by metric name; intervals are those under `<name>_ci_low` and `<name>_ci_high`.
        version: of the program that wrote it.
    """

    title: str
    layout: Literal["hf", "meta"]
    dtype: str
    num_parameters: int
    head: str
    offsets: Sequence[int]
    base: str | None = None
    base_model: str | None = None
    algorithm: str | None = None
    data: Sequence[str] = ()
    datasets: Sequence[str] = ()
    steps: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: str = ""


def render_model_card(card: ModelCard) -> str:
    """Return the text of README.md."""
    front = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {_line(card.title)}",
        _introduction(card),
        _table(["", ""], _facts(card)),
        *_results(card),
        "## Use",
        *(_hf_usage(card) if card.layout == "hf" else _meta_usage(card)),
        *_training(card),
        "## Licence",
        f"The licence and the terms of use of the base model{_named(card.base)} apply to this model too; so "
        "may those of the training data.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: ModelCard) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if card.base_model is not None:
        front["base_model"] = card.base_model
    if card.layout == "hf":
        front["library_name"] = "transformers"
    front["pipeline_tag"] = "text-generation"
    tags = ["wmtp", "multi-token-prediction", card.algorithm, "meta-mtp" if card.layout == "meta" else None]
    front["tags"] = [tag for tag in tags if tag is not None]
    if card.datasets:
        front["datasets"] = list(card.datasets)
    scores = list(_pass_at(card.metrics))
    if scores:
        front["metrics"] = ["code_eval"]
        front["model-index"] = [{"name": _line(card.title), "results": _index_results(scores)}]
    return front


def _index_results(scores: Sequence[tuple[str, int, str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": benchmark, "type": benchmark},
            "metrics": [
                {"type": f"pass@{k}", "name": f"pass@{k}", "value": value}
                for other, k, _, value in scores
                if other == benchmark
            ],
        }
        for benchmark in dict.fromkeys(benchmark for benchmark, *_ in scores)
    ]


def _introduction(card: ModelCard) -> str:
    horizon = len(card.offsets)
    heads = (
        "It predicts the next token."
        if horizon == 1
        else f"Besides the next token it predicts {horizon - 1} further tokens at every position"
        + (", given those between." if card.head == "teacher_forcing" else ", with heads of their own.")
    )
    if card.algorithm is None:
        return f"A causal language model{_named(card.base, before=' made from')}. {heads}"
    how = _ALGORITHMS.get(card.algorithm, "")
    return (
        f"A causal language model, fine-tuned{_named(card.base, before=' from')} by weighted multi-token "
        f"prediction (`{card.algorithm}`{': ' + how if how else ''}). {heads}"
    )


def _facts(card: ModelCard) -> list[list[str]]:
    rows = {
        "Base model": card.base and _code(card.base),
        "Training data": ", ".join(_code(name) for name in card.data),
        "Algorithm": card.algorithm and _code(card.algorithm),
        "Optimizer steps": card.steps and f"{card.steps:,}",
        "Horizon (heads)": str(len(card.offsets)),
        "Form of the extra heads": _code(card.head) if len(card.offsets) > 1 else None,
        "Tokens ahead, head by head": ", ".join(map(str, card.offsets)),
        "Parameters": f"{card.num_parameters:,}",
        "Precision": card.dtype,
        "Layout": "Hugging Face" if card.layout == "hf" else "Meta's native multi-token prediction",
        "Written by": f"WMTP {card.version}" if card.version else None,
    }
    return [[name, value] for name, value in rows.items() if value]


def _results(card: ModelCard) -> list[str]:
    rows = []
    for benchmark, k, name, value in _pass_at(card.metrics):
        low, high = (card.metrics.get(f"{name}_ci_{end}") for end in ("low", "high"))
        interval = "" if low is None or high is None else f"{format_percent(low)} to {format_percent(high)}"
        rows.append([f"{_code(benchmark)}, pass@{k}", format_percent(value), interval])
    rows += [
        [_code(name), format_number(value), ""]
        for name, value in card.metrics.items()
        if _SHOWN_METRICS.match(name)
    ]
    return ["## Results", _table(["Metric", "Value", "95% interval"], rows)] if rows else []


def _hf_usage(card: ModelCard) -> list[str]:
    folder = f"path/to/{_line(card.title)}"
    plain = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
    )
    usage = ["As an ordinary next-token model; the further heads stay unused:", _fence(plain, "python")]
    if len(card.offsets) == 1:
        return usage
    heads = (
        "from wmtp.modeling import MTPModel\n\n"
        f"model = MTPModel.from_pretrained({folder!r})\n"
        "logits = model(input_ids).logits()  # [batch, sequence, head, vocabulary]\n"
    )
    return [*usage, "With all heads, from `mtp_heads.safetensors` and `wmtp.json`:", _fence(heads, "python")]


def _meta_usage(card: ModelCard) -> list[str]:
    code = (
        "from wmtp.modeling import MTPModel\n\n"
        f"model = MTPModel.from_pretrained('path/to/{_line(card.title)}')\n"
    )
    return [
        "`consolidated.pth` and `params.json` in Meta's layout for multi-token prediction, as its own code "
        "reads them; WMTP reads them too:",
        _fence(code, "python"),
    ]


def _training(card: ModelCard) -> list[str]:
    if not card.recipe:
        return []
    recipe = yaml.safe_dump(dict(card.recipe), sort_keys=False, allow_unicode=True)
    return ["## Training", "The recipe, defaults left out:", _fence(recipe, "yaml")]


def _pass_at(metrics: Mapping[str, float]) -> list[tuple[str, int, str, float]]:
    """(benchmark, k, metric name, value) of every pass@k."""
    found = [(_PASS_AT.match(name), name, value) for name, value in metrics.items()]
    return [(match["benchmark"], int(match["k"]), name, value) for match, name, value in found if match]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" if len(header) > 2 else "---" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _named(name: str | None, *, before: str = "") -> str:
    return "" if name is None else f"{before} {_code(name)}" if before else f" ({_code(name)})"


def _line(text: str) -> str:
    return " ".join(visible(text).split())


def _code(text: str) -> str:
    # Inside a code span nothing but the backtick and, in a table, the bar has a meaning.
    return f"`{_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _fence(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{visible(text).rstrip()}\n{marks}"
