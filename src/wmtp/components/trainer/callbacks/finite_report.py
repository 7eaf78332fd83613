"""What is said of a step that was not finite: which head, which micro-batch, which rows, which parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.components.trainer.evidence import GradientNorms, MicroBatchEvidence, UpdateEvidence

# Rows and parameters that one sentence names; the report has them all.
_MAX_NAMED = 4
_KINDS = ("cross entropy", "scores", "weights", "auxiliary loss", "gradient")


@dataclass(frozen=True, slots=True)
class BadStep:
    """What is kept of a step until the host has seen whether it was finite.

    Attributes:
        step: its number, from 1.
        first_micro_batch: index of its first micro-batch among all of the run, from 0.
        loss: the step's loss.
        micro_batches: what was finite in them.
        update: gradient norms and learning rates.
    """

    step: int
    first_micro_batch: int
    loss: Tensor
    micro_batches: Sequence[MicroBatchEvidence]
    update: UpdateEvidence


def describe_step(bad: BadStep, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """The report of a step as strict JSON; waits for the device.

    What is likely to be nearest to the cause comes first in `findings`: cross entropies, scores, the weights
    made of them (one score that is NaN spoils all of a step), the auxiliary loss, gradients by row. They are
    empty where a parameter's gradient alone is not finite, or where it was another rank's.
    """
    findings = [
        {"micro_batch": index, "global_micro_batch": bad.first_micro_batch + index, **finding}
        for index, evidence in enumerate(bad.micro_batches)
        for finding in _findings(evidence)
    ]
    findings.sort(key=lambda finding: _KINDS.index(finding["what"]))
    return {
        "step": bad.step,
        "loss": number(bad.loss),
        "micro_batch_losses": [number(evidence.loss) for evidence in bad.micro_batches],
        "learning_rates": bad.update.learning_rates,
        "gradient_norms": {name: number(norms.total) for name, norms in bad.update.norms.items()},
        "findings": findings,
        "nonfinite_gradients": {
            name: _nonfinite_gradients(norms, modules[name]) for name, norms in bad.update.norms.items()
        },
        "nonfinite_parameters": [
            f"{name}.{parameter_name}"
            for name, module in modules.items()
            for parameter_name, parameter in module.named_parameters()
            if not bool(parameter.detach().isfinite().all())
        ],
    }


def describe_in_words(report: dict[str, Any]) -> str:
    """One sentence for the error message and the log."""
    parameters = report["nonfinite_parameters"]
    themselves = f"; parameters are NaN or infinite themselves: {_some(parameters)}" if parameters else ""
    return f"step {report['step']}: {_where(report)} (loss {report['loss']}){themselves}"


def number(value: Tensor | float) -> float | str:
    """A number as strict JSON can hold it: NaN and infinities as text."""
    plain = float(value)
    return plain if plain - plain == 0.0 else str(plain)


def _where(report: dict[str, Any]) -> str:
    findings = report["findings"]
    if findings:
        return _finding_in_words([finding for finding in findings if finding["what"] == findings[0]["what"]])
    gradients = [f"{name}.{p}" for name, names in report["nonfinite_gradients"].items() for p in names]
    if gradients:
        return f"the gradient of {_some(gradients)} is NaN or infinite, while that of each row is finite"
    overflown = [name for name, norm in report["gradient_norms"].items() if isinstance(norm, str)]
    if overflown:
        return f"the norm of the gradient of {_some(overflown)} overflows"
    return "the loss overflows, or that of another rank is NaN or infinite"


def _findings(evidence: MicroBatchEvidence) -> list[dict[str, Any]]:
    found = [
        _rows_and_heads("cross entropy", evidence, evidence.ce_BH),
        _rows_and_heads("scores", evidence, evidence.score_B),
        _rows_and_heads("weights", evidence, evidence.weight_BH),
    ]
    if evidence.auxiliary is not None and not bool(evidence.auxiliary):
        is_finite_B = _finite_columns(evidence)
        found.append(_rows_and_heads("auxiliary loss", evidence, is_finite_B) or {"what": "auxiliary loss"})
    for flags in (*evidence.hidden_gradient_BH, *evidence.input_gradient_B):
        found.append(_rows_and_heads("gradient", evidence, flags))
    return [finding for finding in found if finding is not None]


def _rows_and_heads(
    what: str, evidence: MicroBatchEvidence, is_finite: Tensor | None
) -> dict[str, Any] | None:
    """Rows, and heads where `is_finite` is [B,H], that are not finite; None where all are."""
    if is_finite is None or bool(is_finite.all()):
        return None
    bad = ~is_finite.cpu()
    bad_B = bad if bad.ndim == 1 else bad.any(dim=1)
    rows = bad_B.nonzero().flatten().tolist()
    finding: dict[str, Any] = {"what": what, "rows": rows, "num_rows": bad.shape[0]}
    if bad.ndim == 2:
        finding["heads"] = bad.any(dim=0).nonzero().flatten().tolist()
    row_ids = evidence.batch.get("row_ids")
    if row_ids is not None:
        finding["row_ids"] = [row_ids[row] for row in rows]
    return finding


def _finite_columns(evidence: MicroBatchEvidence) -> Tensor:
    """Rows whose rewards, which the auxiliary loss is made of, are finite."""
    rewards_BS: Tensor | None = evidence.batch.get("token_rewards")
    num_rows = evidence.ce_BH.shape[0]
    if rewards_BS is None:
        return torch.ones(num_rows, dtype=torch.bool)
    return rewards_BS.isfinite().all(dim=1)


def _nonfinite_gradients(norms: GradientNorms, module: nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    is_bad = (~norms.norm_P.isfinite()).tolist()
    return [names[id(parameter)] for parameter, bad in zip(norms.parameters, is_bad, strict=True) if bad]


def _finding_in_words(findings: list[dict[str, Any]]) -> str:
    first = findings[0]
    heads = sorted({head for finding in findings for head in finding.get("heads", [])})
    of_heads = f" of heads {heads}" if heads else ""
    verb = "are" if first["what"] in ("scores", "weights") else "is"
    places = [_place(finding) for finding in findings]
    return f"the {first['what']}{of_heads} {verb} NaN or infinite in {_some(places)}"


def _place(finding: dict[str, Any]) -> str:
    place = f"micro-batch {finding['micro_batch']} (number {finding['global_micro_batch']} of the run)"
    rows = finding.get("rows")
    if rows is None:
        return place
    if len(rows) == finding["num_rows"] and len(rows) > 1:
        return f"{place}, all {len(rows)} rows"
    ids = [row_id for row_ids in finding.get("row_ids", []) for row_id in row_ids]
    return f"{place}, rows {rows}" + (f": {_some(ids)}" if ids else "")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
