"""Programs sampled for the problems of a dataset; what an interrupted evaluation generated is not repeated.

A dataset's prompts are cut into batches that depend on the prompts and the batch size alone. A batch is
generated whole and recorded whole; one that is incomplete in the records is generated again, in the same
company. So a continued evaluation computes what an uninterrupted one would, to the last bit of its logits.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from wmtp.components.evaluator.base import EvaluatorContext
from wmtp.components.evaluator.fingerprint import model_fingerprint, tokenizer_fingerprint
from wmtp.decoding import Generation, generate
from wmtp.evaluation import Task
from wmtp.evaluation.programs import opens_fence
from wmtp.evaluation.records import Record, RecordFile, key_of, read_records
from wmtp.settings.recipe_eval import EvalSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion: what was asked, with which draws, what came back.

    Attributes:
        task: the problem.
        temperature: 0 is greedy.
        sample: its number among the problem's samples.
        key: of everything that it depends on.
        generation: what the model wrote.
    """

    task: Task
    temperature: float
    sample: int
    key: str
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFiles:
    """Where the samples of a dataset are recorded.

    Attributes:
        folder: of the evaluation.
        dataset: its name.
    """

    folder: Path
    dataset: str

    @property
    def generations(self) -> Path:
        """Completions as they come; gone once a result holds them."""
        return self.folder / f"{self.dataset}.generations.partial.jsonl"

    @property
    def verdicts(self) -> Path:
        """Verdicts as they come; gone once a result holds them."""
        return self.folder / f"{self.dataset}.verdicts.partial.jsonl"

    @property
    def judged(self) -> Path:
        """Result of `meta-mtp`: completions with verdicts."""
        return self.folder / f"{self.dataset}.generations.jsonl"

    @property
    def matched(self) -> Path:
        """Result of `exact-match`: completions with what was expected."""
        return self.folder / f"{self.dataset}.exact_match.jsonl"

    def read(self, *, with_verdicts: bool = False) -> Iterator[Record]:
        """Everything recorded so far, results first."""
        partial = self.verdicts if with_verdicts else self.generations
        for path in (self.judged, self.matched, partial):
            yield from read_records(path)

    def remove_partial(self) -> None:
        """Remove what a result now holds."""
        for path in (self.generations, self.verdicts):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A sample that is wanted: which, of which prompt, under which key."""

    task: Task
    prompt_ids: Sequence[int]
    temperature: float
    sample: int
    key: str


def generate_samples(
    context: EvaluatorContext,
    settings: EvalSettings,
    dataset: str,
    tasks: Sequence[Task],
    temperatures: Sequence[float],
) -> list[Sample]:
    """Generate a dataset's samples, or take them from the records of an interrupted evaluation.

    Args:
        context: model, tokenizer, and the folder of the records; None records nothing.
        settings: how samples are drawn.
        dataset: its name, part of the draws' keys.
        tasks: the problems.
        temperatures: each gives `settings.num_samples` samples a problem, 0 gives one.

    Returns:
        By temperature, then by problem in the order of `tasks`, then by number.
    """
    slots = _slots(context, settings, dataset, tasks, temperatures)
    files = None
    if context.output_dir is not None:
        files = SampleFiles(folder=context.output_dir, dataset=dataset)
    known = _known_generations(files, slots) if files is not None else {}
    if known:
        logger.info("%s: %d of %d completions are there already", dataset, len(known), len(slots))
    file = None if files is None or len(known) == len(slots) else RecordFile(files.generations)
    try:
        for temperature in temperatures:
            own = [slot for slot in slots if slot.temperature == temperature]
            _complete(context, settings, dataset, own, known, file)
    finally:
        if file is not None:
            file.close()
    return [
        Sample(
            task=slot.task,
            temperature=slot.temperature,
            sample=slot.sample,
            key=slot.key,
            generation=known[slot.key],
        )
        for slot in slots
    ]


def sample_record(sample: Sample, settings: EvalSettings, dataset: str) -> Record:
    """What is kept of a sample: enough to generate it again, and to take it in place of doing so."""
    return _record(
        sample.task, sample.temperature, sample.sample, sample.key, sample.generation, settings, dataset
    )


def problem_key(dataset: str, task_id: str) -> int:
    """Return the 64-bit key of a problem's draws.

    A hash of its name, so that a subset of a dataset draws what the whole would.
    """
    digest = hashlib.blake2b(f"{dataset}\0{task_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model was built for; None where its configuration names no limit."""
    text_config = config.get_text_config(decoder=True)
    name = text_config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    length = text_config.to_dict().get(name)
    return None if length is None else int(length)


def samples_at(settings: EvalSettings, temperature: float) -> int:
    """Samples a problem has at a temperature: greedy ones would all be alike."""
    return settings.num_samples if temperature > 0 else 1


def _slots(
    context: EvaluatorContext,
    settings: EvalSettings,
    dataset: str,
    tasks: Sequence[Task],
    temperatures: Sequence[float],
) -> list[_Slot]:
    fingerprint = context.fingerprint
    if context.output_dir is not None and not fingerprint:
        fingerprint = key_of(model_fingerprint(context.model), tokenizer_fingerprint(context.tokenizer))
    prompts = [context.tokenizer.encode_prompt(task.prompt) for task in tasks]
    shared = (
        fingerprint,
        dataset,
        settings.seed,
        settings.max_new_tokens,
        settings.top_k,
        settings.top_p,
        settings.min_p,
    )
    slots = []
    for temperature in temperatures:
        for task, prompt_ids in zip(tasks, prompts, strict=True):
            task_key = key_of(*shared, temperature, task.task_id, list(prompt_ids), list(task.stop))
            for number in range(samples_at(settings, temperature)):
                slots.append(_Slot(task, prompt_ids, temperature, number, f"{task_key}-{number}"))
    return slots


def _known_generations(files: SampleFiles, slots: Sequence[_Slot]) -> dict[str, Generation]:
    """Generations of the slots that are recorded; says how many there are for other models or settings."""
    wanted = {(slot.task.task_id, slot.temperature, slot.sample): slot.key for slot in slots}
    known: dict[str, Generation] = {}
    num_other = 0
    for record in files.read():
        place = (record.get("task_id"), record.get("temperature"), record.get("sample"))
        if place not in wanted:
            continue
        if record.get("key") == wanted[place]:
            known[wanted[place]] = Generation(
                record["token_ids"], record["completion"], record["finish_reason"]
            )
        else:
            num_other += 1
    if num_other:
        logger.warning(
            "%s: %d recorded completions are of another model, prompt or settings and are not used",
            files.dataset,
            num_other,
        )
    return known


def _complete(
    context: EvaluatorContext,
    settings: EvalSettings,
    dataset: str,
    slots: Sequence[_Slot],
    known: dict[str, Generation],
    file: RecordFile | None,
) -> None:
    """Generate what is not known of the slots of one temperature, batch by batch."""
    stage = f"{dataset}: generate at temperature {slots[0].temperature:g}"
    num_done = sum(slot.key in known for slot in slots)
    for stop in dict.fromkeys(slot.task.stop for slot in slots):
        # Like lengths together waste little padding; the longest first shows at once whether memory suffices.
        group = sorted(
            (slot for slot in slots if slot.task.stop == stop), key=lambda slot: -len(slot.prompt_ids)
        )
        for start in range(0, len(group), settings.batch_size):
            batch = group[start : start + settings.batch_size]
            missing = {slot.key for slot in batch} - known.keys()
            if not missing:
                continue

            def report(
                index: int,
                _: Generation,
                batch: Sequence[_Slot] = batch,
                missing: set[str] = missing,
            ) -> None:
                nonlocal num_done
                if batch[index].key in missing:
                    num_done += 1
                    context.on_progress(stage, num_done, len(slots))

            made = _generate_batch(context, settings, dataset, batch, report)
            if file is not None:
                file.append(*(_slot_record(slot, made[slot.key], settings, dataset) for slot in batch))
            known.update(made)


def _generate_batch(
    context: EvaluatorContext,
    settings: EvalSettings,
    dataset: str,
    batch: Sequence[_Slot],
    report: Callable[[int, Generation], None],
) -> dict[str, Generation]:
    generations = _generate(context, settings, dataset, batch, batch[0].task.stop, report)
    # Stop strings of a function's body would end an answer in a fenced block at the block's first line; such
    # answers are written to their end instead, with the same draws.
    is_fenced = [
        slot.task.form != "text" and each.finish_reason == "stop" and opens_fence(each.text)
        for slot, each in zip(batch, generations, strict=True)
    ]
    fenced = [slot for slot, is_cut in zip(batch, is_fenced, strict=True) if is_cut]
    whole = iter(_generate(context, settings, dataset, fenced, (), None) if fenced else ())
    return {
        slot.key: next(whole) if is_cut else generation
        for slot, generation, is_cut in zip(batch, generations, is_fenced, strict=True)
    }


def _generate(
    context: EvaluatorContext,
    settings: EvalSettings,
    dataset: str,
    batch: Sequence[_Slot],
    stop: Sequence[str],
    report: Callable[[int, Generation], None] | None,
) -> list[Generation]:
    model = context.model.causal_lm
    with context.autocast():
        return generate(
            model,
            [slot.prompt_ids for slot in batch],
            tokenizer=context.tokenizer.tokenizer,
            max_new_tokens=settings.max_new_tokens,
            temperature=batch[0].temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            seed=settings.seed,
            keys=[(problem_key(dataset, slot.task.task_id), slot.sample) for slot in batch],
            stop=stop,
            batch_size=len(batch),
            context_length=context_length(model.config),
            on_done=report,
        )


def _slot_record(slot: _Slot, generation: Generation, settings: EvalSettings, dataset: str) -> Record:
    return _record(slot.task, slot.temperature, slot.sample, slot.key, generation, settings, dataset)


def _record(
    task: Task,
    temperature: float,
    sample: int,
    key: str,
    generation: Generation,
    settings: EvalSettings,
    dataset: str,
) -> Record:
    drawn: Mapping[str, Any] = {
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
    }
    return {
        "task_id": task.task_id,
        "temperature": temperature,
        **drawn,
        "problem_key": problem_key(dataset, task.task_id),
        "sample": sample,
        "key": key,
        "prompt": task.prompt,
        "completion": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
    }
