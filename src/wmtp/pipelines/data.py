"""From the recipe's `data` section to micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wmtp.components.data import Batch, BatchPlan, Example, Feature, TrainingData, evaluation_batches
from wmtp.components.data.batching import Collator
from wmtp.components.data.formats import Split
from wmtp.components.tokenizer import HfTokenizer
from wmtp.evaluation import Task
from wmtp.exceptions import DataError
from wmtp.factory import ComponentFactory, padding_multiple
from wmtp.settings import Config, Recipe, find_dataset

# Share of the training rows held out for validation where data.eval.sources is empty and a source has no
# validation split of its own.
_HOLDOUT_SHARE = 0.05


@dataclass(slots=True)
class PreparedData:
    """Everything a run reads.

    Attributes:
        examples: training examples by `row_id`.
        features: the training examples tokenised, those that were too long left out.
        validation: tokenised examples that are not trained on.
        collator: makes batches of features.
    """

    examples: dict[str, Example]
    features: list[Feature]
    validation: list[Feature]
    collator: Collator
    recipe: Recipe

    def training_data(self) -> TrainingData:
        """The endless sequence of training micro-batches."""
        train = self.recipe.data.train
        plan = BatchPlan(
            [len(feature["input_ids"]) for feature in self.features],
            batch_size=train.batch_size,
            max_length=train.max_length,
            seed=self.recipe.train.seed,
            shuffle=train.shuffle,
            pack=train.pack_sequences,
            max_tokens_per_batch=train.max_tokens_per_batch,
            pad_to_multiple_of=padding_multiple(train),
        )
        return TrainingData(self.features, plan, self.collator, num_workers=train.num_workers)

    def validation_batches(self) -> Iterator[Batch]:
        """Every validation example once."""
        return evaluation_batches(self.validation, self.collator, self.recipe.data.eval.batch_size)


def prepare_data(
    config: Config, recipe: Recipe, tokenizer: HfTokenizer, metadata: dict[str, Any]
) -> PreparedData:
    """Load and tokenise training and validation examples.

    Raises:
        DataError: a source is missing, empty or has a bad row; the message names file and line.
    """
    train = _load_sources(config, recipe, recipe.data.train.sources, "train", limit=None)
    limit = recipe.data.eval.max_examples
    if recipe.data.eval.sources:
        held_out = _load_sources(config, recipe, recipe.data.eval.sources, "validation", limit=limit)
    else:
        train, held_out = _hold_out(train, min(int(_HOLDOUT_SHARE * len(train)), limit), recipe.train.seed)
    return PreparedData(
        examples={example.row_id: example for example in train},
        features=tokenizer.tokenize_dataset(train),
        validation=tokenizer.tokenize_dataset(held_out) if held_out else [],
        collator=ComponentFactory.create_collator(recipe, config, tokenizer.tokenizer, metadata),
        recipe=recipe,
    )


def prepare_validation(config: Config, recipe: Recipe, tokenizer: HfTokenizer, horizon: int) -> PreparedData:
    """Held-out examples alone, for an evaluation without training; none where the recipe names no source."""
    limit = recipe.data.eval.max_examples
    held_out = _load_sources(config, recipe, recipe.data.eval.sources, "validation", limit=limit)
    metadata = {"training_algorithm": "mtp", "horizon": horizon}
    return PreparedData(
        examples={},
        features=[],
        validation=tokenizer.tokenize_dataset(held_out) if held_out else [],
        collator=ComponentFactory.create_collator(recipe, config, tokenizer.tokenizer, metadata),
        recipe=recipe,
    )


def evaluation_tasks(config: Config, recipe: Recipe) -> dict[str, list[Task]]:
    """The tasks of every dataset of `eval.datasets`, at most `eval.max_problems` each.

    Raises:
        DataError: a dataset is missing, or its rows carry no tests.
    """
    loader = ComponentFactory.create_data_loader(recipe, config)
    tasks = {}
    for name in recipe.eval.datasets:
        examples = loader.load(find_dataset(config, name), split="test", limit=recipe.eval.max_problems)
        with_tests = [example.task for example in examples if example.task is not None]
        if not with_tests:
            raise DataError(
                f"dataset {name!r} has no rows with tests, so pass@k cannot be measured on it",
                remedy="take it out of eval.datasets, or use mbpp, humaneval or microcode rows",
            )
        tasks[name] = with_tests
    return tasks


def _load_sources(
    config: Config, recipe: Recipe, sources: list[str], split: Split, *, limit: int | None
) -> list[Example]:
    """Examples of all sources, at most `limit`; with several sources their row ids name the source too."""
    loader = ComponentFactory.create_data_loader(recipe, config)
    examples = []
    for source in sources:
        for example in loader.load(find_dataset(config, source), split=split, limit=limit):
            row_id = example.row_id if len(sources) == 1 else f"{source}:{example.row_id}"
            examples.append(replace(example, row_id=row_id))
    return examples[:limit]


def _hold_out(examples: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, drawn by seed, because files are often sorted."""
    generator = np.random.Generator(np.random.PCG64([seed, len(examples)]))
    held_out = set(generator.permutation(len(examples))[:count].tolist())
    return (
        [example for index, example in enumerate(examples) if index not in held_out],
        [example for index, example in enumerate(examples) if index in held_out],
    )
