"""From the recipe's `data` section to micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from wmtp.components.data import (
    Batch,
    BatchPlan,
    Example,
    ExampleSource,
    Feature,
    MicroBatches,
    StreamingData,
    StreamPosition,
    StreamSettings,
    TrainingData,
    evaluation_batches,
    hold_out,
    open_source,
    read_epoch,
)
from wmtp.components.data.batching import Collator
from wmtp.components.data.examples import TokenizedCount
from wmtp.components.data.formats import Split
from wmtp.components.tokenizer import HfTokenizer
from wmtp.factory import ComponentFactory, padding_multiple
from wmtp.settings import Config, Recipe, find_dataset

logger = logging.getLogger(__name__)

# Share of the training rows held out for validation where data.eval.sources is empty and a source has no
# validation split of its own.
_HOLDOUT_SHARE = 0.05
# Training examples of a stream that are tokenised at once, for the report.
_NUM_SAMPLE_FEATURES = 32


@dataclass(slots=True)
class ExampleStream:
    """Training examples that are read as they are needed, and tokenised with a check.

    Attributes:
        sources: where they are.
        tokenizer: makes features of them.
        excluded: hashes of those held out.
        check: called with all features that are trained on.
    """

    sources: list[ExampleSource]
    tokenizer: HfTokenizer
    excluded: frozenset[str]
    check: Callable[[Sequence[Feature]], None] | None = None

    def tokenize_chunk(self, examples: Sequence[Example]) -> tuple[list[Feature], TokenizedCount]:
        """See `HfTokenizer.tokenize_chunk`."""
        features, count = self.tokenizer.tokenize_chunk(examples)
        if self.check is not None:
            self.check(features)
        return features, count

    def report(self, count: TokenizedCount) -> None:
        """See `HfTokenizer.report`."""
        self.tokenizer.report(count)

    def first_examples(self, limit: int, *, seed: int, shuffle: bool) -> list[Example]:
        """The first examples of the first epoch, before they are shuffled among themselves."""
        start = StreamPosition.start(len(self.sources))
        rows = read_epoch(self.sources, start, seed=seed, shuffle=shuffle, excluded=self.excluded)
        return list(islice(chain.from_iterable(examples for examples, _, _ in rows), limit))


@dataclass(slots=True)
class PreparedData:
    """Everything a run reads.

    Attributes:
        examples: training examples by `row_id`; none where they are streamed.
        features: the training examples tokenised, those that were too long left out; some of them where they
            are streamed.
        validation: tokenised examples that are not trained on.
        collator: makes batches of features.
        stream: the training examples where they are streamed.
    """

    examples: dict[str, Example]
    features: list[Feature]
    validation: list[Feature]
    collator: Collator
    recipe: Recipe
    stream: ExampleStream | None = None

    def check_features(self, check: Callable[[Sequence[Feature]], None]) -> None:
        """Have all training features checked: now, or as they come where they are streamed."""
        check(self.features)
        if self.stream is not None:
            self.stream.check = check

    def training_data(self) -> MicroBatches:
        """The endless sequence of training micro-batches."""
        train = self.recipe.data.train
        if self.stream is not None:
            settings = StreamSettings(
                batch_size=train.batch_size,
                max_length=train.max_length,
                shuffle_buffer=train.shuffle_buffer,
                seed=self.recipe.train.seed,
                shuffle=train.shuffle,
                pack=train.pack_sequences,
                max_tokens_per_batch=train.max_tokens_per_batch,
                pad_to_multiple_of=padding_multiple(train),
                num_workers=train.num_workers,
            )
            return StreamingData(
                self.stream.sources, self.stream, self.collator, settings, excluded=self.stream.excluded
            )
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
    """Load and tokenise training and validation examples; training examples only where they fit into memory.

    Raises:
        DataError: a source is missing, empty or has a bad row; the message names file and line.
    """
    sources = _sources_to_stream(config, recipe)
    if sources is not None:
        return _prepare_stream(config, recipe, tokenizer, metadata, sources)
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


def _sources_to_stream(config: Config, recipe: Recipe) -> list[ExampleSource] | None:
    """The training sources where they are streamed; None where they are held in memory."""
    train = recipe.data.train
    if train.streaming is False:
        return None
    loader = ComponentFactory.create_data_loader(recipe, config)
    sources = [
        open_source(
            loader,
            name,
            find_dataset(config, name),
            split="train",
            names_rows=len(train.sources) > 1,
        )
        for name in train.sources
    ]
    size_mib = sum(source.num_bytes for source in sources) / 2**20
    if train.streaming == "auto" and size_mib <= train.in_memory_mib:
        return None
    if recipe.train.algo == "critic-wmtp":
        logger.warning(
            "critic-wmtp goes through all examples first, so %.0f MiB of training data are held in memory; "
            "where that is too much, train on a part of them",
            size_mib,
        )
        return None
    logger.info("the training data, %.1f MiB, are streamed", size_mib)
    return sources


def _prepare_stream(
    config: Config,
    recipe: Recipe,
    tokenizer: HfTokenizer,
    metadata: dict[str, Any],
    sources: list[ExampleSource],
) -> PreparedData:
    """Validation examples, and training examples that are yet to be read."""
    train, seed, limit = recipe.data.train, recipe.train.seed, recipe.data.eval.max_examples
    excluded: frozenset[str] = frozenset()
    if recipe.data.eval.sources:
        held_out = _load_sources(config, recipe, recipe.data.eval.sources, "validation", limit=limit)
    else:
        held_out, excluded = hold_out(sources, share=_HOLDOUT_SHARE, limit=limit, seed=seed)
    stream = ExampleStream(sources, tokenizer, excluded)
    sample = stream.first_examples(_NUM_SAMPLE_FEATURES, seed=seed, shuffle=train.shuffle)
    return PreparedData(
        examples={},
        features=tokenizer.tokenize_chunk(sample)[0],
        validation=tokenizer.tokenize_dataset(held_out) if held_out else [],
        collator=ComponentFactory.create_collator(recipe, config, tokenizer.tokenizer, metadata),
        recipe=recipe,
        stream=stream,
    )


def prepare_validation(
    config: Config, recipe: Recipe, tokenizer: HfTokenizer, horizon: int, *, is_needed: bool = True
) -> PreparedData:
    """Held-out examples alone, for an evaluation without training.

    Where the recipe names no source they are the right solutions of the test split of `eval.datasets`. None
    where nothing is to be measured on them.
    """
    limit = recipe.data.eval.max_examples
    held_out: list[Example] = []
    if is_needed and recipe.data.eval.sources:
        held_out = _load_sources(config, recipe, recipe.data.eval.sources, "validation", limit=limit)
    elif is_needed:
        logger.info(
            "data.eval.sources is empty: losses are measured on solutions of %s",
            ", ".join(recipe.eval.datasets),
        )
        loaded = _load_sources(config, recipe, recipe.eval.datasets, "test", limit=limit)
        held_out = [example for example in loaded if example.reward is None or example.reward > 0]
    metadata = {"training_algorithm": "mtp", "horizon": horizon}
    return PreparedData(
        examples={},
        features=[],
        validation=tokenizer.tokenize_dataset(held_out) if held_out else [],
        collator=ComponentFactory.create_collator(recipe, config, tokenizer.tokenizer, metadata),
        recipe=recipe,
    )


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
