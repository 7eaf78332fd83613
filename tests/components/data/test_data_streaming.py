"""A stream can be left anywhere and taken up again: the same micro-batches, bit for bit, at bounded cost."""

from __future__ import annotations

import gc
import gzip
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from wmtp.components.data import (
    Batch,
    Example,
    Feature,
    MTPDataCollator,
    StreamingData,
    StreamSettings,
    UnifiedDataLoader,
    open_source,
)
from wmtp.components.data.examples import TokenizedCount
from wmtp.components.tokenizer import HfTokenizer
from wmtp.exceptions import CheckpointError, DataError

MAX_LENGTH = 48
Rows = list[dict[str, str]]
MakeData = Callable[..., StreamingData]


def numbered(start: int, count: int) -> Rows:
    """Rows of different lengths, each with its own text."""
    return [
        {"text": f"{number}" + " add(a, b)" * (1 + number * 7 % 5)} for number in range(start, start + count)
    ]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows in the form that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=5)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(list(rows)))  # all elements on one line
    else:
        path.write_bytes(lines)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sources of 67 rows: a folder with a file of every kind, and a single file."""
    folder = tmp_path_factory.mktemp("corpus")
    write_rows(folder / "many/a.jsonl", numbered(0, 13))
    write_rows(folder / "many/b.jsonl.gz", numbered(13, 9))
    write_rows(folder / "many/c.jsonl.zst", numbered(22, 8))
    write_rows(folder / "many/d.parquet", numbered(30, 12))
    write_rows(folder / "many/e.json", numbered(42, 6))
    return folder / "many", write_rows(folder / "one.jsonl", numbered(48, 19))


class CountingTokenizer:
    """Counts the examples that were tokenised."""

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_examples = 0

    def tokenize_chunk(self, examples: Sequence[Example]) -> tuple[list[Feature], TokenizedCount]:
        self.num_examples += len(examples)
        return self.tokenizer.tokenize_chunk(examples)

    def report(self, count: TokenizedCount) -> None:
        self.tokenizer.report(count)


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer: PreTrainedTokenizerFast) -> HfTokenizer:
    return HfTokenizer({"tokenizer": tokenizer, "max_length": MAX_LENGTH})


@pytest.fixture(scope="module")
def make(tokenizer: PreTrainedTokenizerFast, hf_tokenizer: HfTokenizer) -> MakeData:
    """Open sources anew, as another process would, and stream them."""

    def make_data(
        *paths: Path,
        on_bad_row: str = "fail",
        counting: CountingTokenizer | None = None,
        excluded: frozenset[str] = frozenset(),
        **arguments: Any,
    ) -> StreamingData:
        loader = UnifiedDataLoader({"on_bad_row": on_bad_row})
        sources = [
            open_source(loader, path.name, str(path), split="train", names_rows=len(paths) > 1)
            for path in paths
        ]
        collator = MTPDataCollator({"tokenizer": tokenizer, "horizon": 2})
        defaults = {"batch_size": 2, "max_length": MAX_LENGTH, "shuffle_buffer": 16, "seed": 3}
        stream = StreamSettings(**{**defaults, **arguments})
        return StreamingData(sources, counting or hf_tokenizer, collator, stream, excluded=excluded)

    return make_data


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(islice(batches, count))


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            equal = value.equal(other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert equal, key


def rows_of(batches: Sequence[Batch]) -> list[str]:
    return [name for batch in batches for row in batch["row_ids"] for name in row]


def epochs_of(data: StreamingData, count: int) -> list[list[Batch]]:
    """The first micro-batches by epoch, the last, unfinished epoch left out."""
    batches = take(data.batches(), count)
    epochs: dict[int, list[Batch]] = {}
    for index, batch in enumerate(batches):
        epochs.setdefault(data.epoch_at(index), []).append(batch)
    return [epochs[number] for number in sorted(epochs)][:-1]


def saved(data: StreamingData, index: int) -> dict[str, Any]:
    """The state as it comes back from a file."""
    state: dict[str, Any] = json.loads(json.dumps(data.state_at(index)))
    assert state == data.state_at(index)
    return state


stream_arguments = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 4),
        "shuffle_buffer": st.sampled_from([1, 5, 16, 30, 200]),
        "seed": st.integers(0, 2),
        "shuffle": st.booleans(),
        "pack": st.booleans(),
        "max_tokens_per_batch": st.sampled_from([None, 48, 120]),
        "pad_to_multiple_of": st.sampled_from([None, 8]),
    }
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stream_arguments, st.integers(0, 120), st.integers(0, 40), st.integers(1, 9))
def test_a_run_left_anywhere_twice_goes_on_with_the_very_same_batches(
    make: MakeData, corpus: tuple[Path, Path], arguments: dict[str, Any], first: int, more: int, ahead: int
) -> None:
    second = first + more
    whole = take(make(*corpus, **arguments).batches(), second + 12)

    data = make(*corpus, **arguments)
    # The trainer has consumed `first`; what was handed out ahead of it must not show in the state.
    take(data.batches(), first + ahead)
    state = saved(data, first)
    resumed = make(*corpus, **arguments)
    assert_same(take(resumed.batches(first, state), more), whole[first:second])
    again = make(*corpus, **arguments)
    assert_same(take(again.batches(second, saved(resumed, second)), 12), whole[second:])


@pytest.mark.parametrize("pack", [False, True])
def test_every_position_of_two_epochs_can_be_resumed(
    make: MakeData, corpus: tuple[Path, Path], pack: bool
) -> None:
    data = make(*corpus, pack=pack, shuffle_buffer=10)
    count = sum(map(len, epochs_of(data, 200)[:2])) + 1
    whole = take(data.batches(), count + 3)
    states = [saved(data, index) for index in range(count)]
    assert {state["position"]["epoch"] for state in states} == {0, 1, 2}
    assert len({state["position"]["block"] for state in states}) > 5
    for index, state in enumerate(states):
        resumed = make(*corpus, pack=pack, shuffle_buffer=10)
        assert resumed.batches(index, state) is not None
        assert resumed.epoch_at(index) == data.epoch_at(index)
        assert_same(take(resumed.batches(index, state), 3), whole[index : index + 3])
        assert saved(resumed, index) == state


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stream_arguments)
def test_an_epoch_visits_every_row_once_and_keeps_within_rows_and_tokens(
    make: MakeData, corpus: tuple[Path, Path], arguments: dict[str, Any]
) -> None:
    loader = UnifiedDataLoader()
    expected = Counter(f"{path.name}:{row.row_id}" for path in corpus for row in loader.load(str(path)))
    epochs = epochs_of(make(*corpus, **arguments), 220)
    assert epochs
    for batches in epochs:
        assert Counter(rows_of(batches)) == expected
        for batch in batches:
            assert batch["input_ids"].shape[1] <= MAX_LENGTH
            assert arguments["pack"] or all(len(row) == 1 for row in batch["row_ids"])
            if arguments["max_tokens_per_batch"] is None:
                assert len(batch["input_ids"]) <= arguments["batch_size"]
            else:
                assert batch["input_ids"].numel() <= arguments["max_tokens_per_batch"]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_change_neither_batches_nor_states(
    make: MakeData, corpus: tuple[Path, Path], num_workers: int
) -> None:
    alone, helped = make(*corpus), make(*corpus, num_workers=num_workers)
    whole = take(alone.batches(), 60)
    assert_same(take(helped.batches(), 60), whole)
    assert [helped.state_at(index) for index in range(61)] == [alone.state_at(index) for index in range(61)]
    resumed = make(*corpus, num_workers=num_workers)
    assert_same(take(resumed.batches(31, saved(helped, 31)), 29), whole[31:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_slices_of_ranks_make_up_the_one_global_sequence(
    make: MakeData, corpus: tuple[Path, Path], world_size: int
) -> None:
    whole = take(make(*corpus).batches(), 30)
    slices = [list(islice(make(*corpus).batches(), rank, 30, world_size)) for rank in range(world_size)]
    assert_same([slices[index % world_size][index // world_size] for index in range(30)], whole)


def test_seed_and_epoch_change_the_order_and_the_company_of_rows(
    make: MakeData, corpus: tuple[Path, Path]
) -> None:
    first, second = epochs_of(make(*corpus, pack=False), 120)[:2]
    other = epochs_of(make(*corpus, pack=False, seed=4), 120)[0]
    assert len({tuple(rows_of(batches)) for batches in (first, second, other)}) == 3
    unshuffled = epochs_of(make(corpus[1], pack=False, shuffle=False), 60)
    assert rows_of(unshuffled[0]) == rows_of(unshuffled[1]) == [f"one.jsonl:{line}" for line in range(1, 20)]


def test_sources_are_mixed_evenly_however_different_their_sizes(make: MakeData, tmp_path: Path) -> None:
    large = write_rows(tmp_path / "large.jsonl", numbered(0, 90))
    small = write_rows(tmp_path / "small.jsonl", numbered(500, 30))
    batches = epochs_of(make(large, small, pack=False, shuffle=False, batch_size=1), 130)[0]
    is_small = [name.startswith("small") for name in rows_of(batches)]
    for start in range(0, 120, 40):
        assert 8 <= sum(is_small[start : start + 40]) <= 12


def test_a_resume_tokenises_one_block_and_not_what_came_before(
    make: MakeData, hf_tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", numbered(0, 1000))
    data = make(path, pack=False, shuffle_buffer=50)
    whole = take(data.batches(), 440)
    counting = CountingTokenizer(hf_tokenizer)
    resumed = make(path, pack=False, shuffle_buffer=50, counting=counting)
    assert_same(take(resumed.batches(437, saved(data, 437)), 3), whole[437:])
    assert counting.num_examples <= 50


def test_a_resume_of_a_plain_file_starts_reading_at_its_block(
    make: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wmtp.storage import rows as reading

    path = write_rows(tmp_path / "rows.jsonl", numbered(0, 1000))
    data = make(path, pack=False, shuffle_buffer=50)
    take(data.batches(), 400)
    decoded: list[int] = []
    decode = reading._json_row
    monkeypatch.setattr(
        reading, "_json_row", lambda content, name, line: decoded.append(line) or decode(content, name, line)
    )
    take(make(path, pack=False, shuffle_buffer=50).batches(400, saved(data, 400)), 1)
    assert min(decoded) > 700
    assert len(decoded) <= 51


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_in_memory_are_bounded_by_the_buffer_and_not_by_the_data(
    make: MakeData, tmp_path: Path, num_workers: int
) -> None:
    buffer = 300
    path = write_rows(tmp_path / "rows.jsonl", numbered(0, 3000))
    peak = 0
    batches = make(path, shuffle_buffer=buffer, num_workers=num_workers, pack=False).batches()
    for _ in range(6):
        take(batches, 190)
        peak = max(peak, num_live_rows())
    # One block, and the chunk that is being read; with workers also what they have prepared: another block.
    assert buffer / 2 < peak <= (buffer + 257 if num_workers == 0 else 3 * buffer + 2 * 256)


def num_live_rows() -> int:
    return sum(
        type(item) is Example or (type(item) is dict and "input_ids" in item and "row_id" in item)
        for item in gc.get_objects()
    )


def test_a_state_is_small_and_plain_json(make: MakeData, corpus: tuple[Path, Path]) -> None:
    data = make(*corpus)
    take(data.batches(), 40)
    assert len(json.dumps(data.state_at(40))) < 1200


def test_the_global_random_state_is_left_alone(make: MakeData, corpus: tuple[Path, Path]) -> None:
    before = torch.get_rng_state()
    take(make(*corpus, num_workers=2).batches(), 30)
    assert torch.get_rng_state().equal(before)


def change_size(path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")


def change_content(path: Path) -> None:
    path.write_text(path.read_text().replace("add", "sub", 1))


@pytest.mark.parametrize("change", [change_size, change_content, Path.unlink])
def test_a_file_that_changed_since_the_save_is_refused_by_name(
    make: MakeData, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    write_rows(tmp_path / "data/a.jsonl", numbered(0, 30))
    changed = write_rows(tmp_path / "data/b.jsonl", numbered(30, 30))
    data = make(tmp_path / "data")
    take(data.batches(), 4)
    state = saved(data, 4)
    change(changed)
    with pytest.raises(CheckpointError, match=r"data has changed since.*\n  b\.jsonl: \d+ bytes, modified @"):
        make(tmp_path / "data").batches(4, state)


def test_a_file_that_changes_during_the_run_is_refused_at_the_next_epoch(
    make: MakeData, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", numbered(0, 30))
    batches = make(path, shuffle_buffer=8).batches()
    take(batches, 2)
    change_size(path)
    with pytest.raises(DataError, match=r"rows\.jsonl .* has changed while the run reads it"):
        take(batches, 100)


def test_a_state_of_another_index_or_mode_or_hold_out_is_refused(
    make: MakeData, corpus: tuple[Path, Path]
) -> None:
    data = make(*corpus)
    take(data.batches(), 6)
    with pytest.raises(CheckpointError, match=r"saved after 6 micro-batches, but the run goes on after 3"):
        make(*corpus).batches(3, data.state_at(6))
    with pytest.raises(CheckpointError, match=r"(?s)held its data in memory.*streaming: false"):
        make(*corpus).batches(6, {})
    with pytest.raises(CheckpointError, match=r"other examples are held out"):
        make(*corpus, excluded=frozenset({"0" * 32})).batches(6, data.state_at(6))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_stops_the_stream_at_its_block_with_file_and_line(
    make: MakeData, tmp_path: Path, num_workers: int
) -> None:
    rows: list[Any] = [*numbered(0, 40), "not an object", *numbered(40, 20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = {"pack": False, "shuffle_buffer": 8, "batch_size": 1, "num_workers": num_workers}
    batches = make(path, **arguments).batches()
    # Blocks before the bad row are trained on, whatever workers have read ahead.
    assert len(set(rows_of(take(batches, 30)))) == 30
    with pytest.raises(DataError, match=r"rows\.jsonl:41: not a JSON object"):
        take(batches, 30)
    assert multiprocessing.active_children() == []


def test_skipped_bad_rows_are_counted_and_a_resume_skips_them_too(
    make: MakeData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = [*numbered(0, 20), 7, *numbered(20, 20), {"prompt": "other fields"}, *numbered(40, 9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = make(path, on_bad_row="skip")
    whole = take(data.batches(), 60)
    assert "skipped 2 bad row(s)" in caplog.text
    assert len(set(rows_of(whole))) == 49
    for index in range(0, 50, 7):
        resumed = make(path, on_bad_row="skip")
        assert_same(take(resumed.batches(index, saved(data, index)), 4), whole[index : index + 4])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_tokenizer_comes_as_itself(make: MakeData, tmp_path: Path, num_workers: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*numbered(0, 9), {"text": "a b", "weights": [1.0] * 99}])
    with pytest.raises(DataError, match=r"^rows\.jsonl:10 has 99 weights") as raised:
        take(make(path, num_workers=num_workers).batches(), 60)
    assert raised.value.remedy is not None


def test_data_without_a_token_to_learn_ends_in_an_error_and_not_in_an_endless_search(
    make: MakeData, tmp_path: Path
) -> None:
    rows = [{"prompt": "add(a, b) " * 20, "completion": "x"}] * 20
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for start in (lambda data: take(data.batches(), 1), lambda data: data.longest_batch()):
        with pytest.raises(DataError, match="none of 20 examples has a token to learn"):
            start(make(path))
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"no usable rows in empty\.jsonl"):
        take(make(empty).batches(), 1)


def test_examples_that_were_cut_are_counted_once_after_the_first_epoch(
    make: MakeData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*numbered(0, 20), {"text": "add(a, b) " * 60}])
    take(make(path).batches(), 60)
    assert caplog.text.count("1 of 21 examples are longer than 48 tokens") == 1


def test_the_longest_batch_is_the_widest_of_the_first_block(
    make: MakeData, corpus: tuple[Path, Path]
) -> None:
    data = make(*corpus, shuffle_buffer=500, pack=False)
    first_epoch = epochs_of(data, 100)[0]
    block = take(data.batches(), len(first_epoch))
    longest = data.longest_batch()
    first_block = [batch for index, batch in enumerate(block) if data.state_at(index)["block_index"] == 0]
    assert longest["input_ids"].numel() == max(batch["input_ids"].numel() for batch in first_block)
