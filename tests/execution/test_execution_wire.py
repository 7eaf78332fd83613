"""Values cross the channel exactly or not at all; what is no message is refused."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.execution.peer import CALL, LOAD, QUIT, ChannelClosedError, Peer, RemoteFunction, Unverifiable
from wmtp.execution.wire import GarbledMessageError, UncarriableError, decode, encode

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.binary()
    | st.just(...)
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 5))
    | st.sampled_from([int, str, dict, type(None)])
)
hashables = st.recursive(
    scalars.filter(lambda value: value == value),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.sets(hashables, max_size=3)
        | st.dictionaries(hashables, inner, max_size=3).map(dict.values)
        | st.binary(max_size=5).map(bytearray)
        | st.lists(inner, max_size=3).map(collections.deque)
        | st.dictionaries(hashables, inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(hashables, st.integers(), max_size=3).map(collections.Counter)
    ),
    max_leaves=20,
)


def lonely_peer() -> Peer:
    return Peer(-1, -1)


def carried(value: Any) -> Any:
    return decode(lonely_peer(), encode(lonely_peer(), value, [], []), [])[0]


def exact(value: Any) -> Any:
    """A form in which equal means: same types all through, same content, NaN and signed zeros included."""
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [exact(item) for item in value]
    if isinstance(value, type({}.values())):
        return type(value), [exact(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, map(exact, value)))
    if isinstance(value, complex):
        return complex, exact(value.real), exact(value.imag)
    if isinstance(value, float):
        return float, "nan" if math.isnan(value) else value.hex()
    return type(value), value


@settings(deadline=None)
@given(values)
def test_every_value_arrives_exactly(value: Any) -> None:
    assert exact(carried(value)) == exact(value)


def test_integers_beyond_the_decimal_limit_arrive() -> None:
    assert carried(1 << 100_000) == 1 << 100_000


def test_sharing_and_cycles_keep_their_shape() -> None:
    row = [0]
    cycle: list[Any] = [row, row, {"row": row}]
    cycle.append(cycle)
    copy = carried(cycle)
    assert copy[0] is copy[1] is copy[2]["row"]
    assert copy[3] is copy


def test_views_of_dictionaries_arrive_as_what_they_are() -> None:
    table = {"b": [1], "a": 2.5}
    for view in (table.keys(), table.values(), table.items()):
        copy = carried(view)
        assert type(copy) is type(view)
        assert list(copy) == list(view)
    assert carried(table.keys()) == {"a", "b"}
    assert carried({1: 2}.items()) == {(1, 2)}
    assert carried(table.values()) != list(table.values())


def test_defaultdict_keeps_its_factory() -> None:
    copy = carried(collections.defaultdict(list, a=[1]))
    assert copy == {"a": [1]}
    assert copy["new"] == []


class _AlwaysEqual:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


class _Integer(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class _CallableEqual(_AlwaysEqual):
    def __call__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "value",
    [
        _AlwaysEqual(),
        _Integer(3),
        _CallableEqual(),
        _AlwaysEqual,
        [(1, {"a": _Integer(3)})],
        collections.namedtuple("Pair", "a b")(1, 2),
        type("Text", (str,), {})("x"),
        type("List", (list,), {})([1]),
        object(),
        math,
    ],
)
def test_objects_of_other_classes_are_refused(value: Any) -> None:
    with pytest.raises(UncarriableError):
        encode(lonely_peer(), value, [], [])


def test_deeply_nested_tuples_are_refused_by_both_sides() -> None:
    value: Any = ()
    for _ in range(200):
        value = (value,)
    with pytest.raises(UncarriableError, match="deep"):
        encode(lonely_peer(), value, [], [])
    with pytest.raises(GarbledMessageError):
        decode(lonely_peer(), b"0:" + b"(1:" * 100_000 + b"N0:", [])


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_a_value_or_a_garbled_message(data: bytes) -> None:
    with contextlib.suppress(GarbledMessageError):
        decode(lonely_peer(), data, [])


@settings(deadline=None)
@given(values, st.data())
def test_damaged_messages_are_a_value_or_a_garbled_message(value: Any, data: st.DataObject) -> None:
    message = bytearray(encode(lonely_peer(), value, [], []))
    place = data.draw(st.integers(0, len(message) - 1))
    message[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(GarbledMessageError):
        decode(lonely_peer(), bytes(message), [])


@pytest.mark.parametrize(
    "data",
    [
        b"0:s999999999:x0:",
        b"0:(999999999:N0:",
        b"0:@0;0:",
        b"0:p0;0:",
        b"1:z@0;0:",
        b"1:l@-1;0:1:N",
        b"0:tos.system;0:",
        b"0:N0:rest",
        b"0:i" + b"_" * 50 + b";0:",
        b"1:s@0;0:1:@0;",
        b"1:D@0;0:i1;0:",
        b"1:lk1:@0;0:0:",
        b"0:m1:N0:",
    ],
)
def test_malformed_messages_are_refused(data: bytes) -> None:
    with pytest.raises(GarbledMessageError):
        decode(lonely_peer(), data, [])


@contextmanager
def connected(function: Callable[..., Any]) -> Iterator[tuple[Peer, RemoteFunction]]:
    """A peer and a stand-in for the function, which lives at the other end, served by a thread."""
    there_read, here_write = os.pipe()
    here_read, there_write = os.pipe()
    here, there = Peer(here_read, here_write), Peer(there_read, there_write)
    assert there.export(function, is_iterator=False) == LOAD

    def serve() -> None:
        try:
            while (frame := there.receive())[0] == CALL:
                there.serve(frame[1])
        except (Unverifiable, ChannelClosedError, GarbledMessageError):
            pass
        os.close(there_write)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield here, RemoteFunction(here, LOAD, function.__name__)
    finally:
        here.send(QUIT)
        thread.join(10)
        for descriptor in (there_read, here_write, here_read):
            os.close(descriptor)


def test_arguments_changed_in_place_are_changed_for_the_caller() -> None:
    def sort_all(rows: list[list[int]], seen: set[int], table: dict[str, Any], queue: Any) -> int:
        for row in rows:
            row.sort()
        rows.append([9])
        seen.add(7)
        table["rows"] = rows
        queue.append(3)
        return len(rows)

    shared = [3, 1, 2]
    rows, seen, table, queue = [shared, shared], {1}, {"a": 1}, collections.deque([1], 2)
    with connected(sort_all) as (_, remote):
        assert remote(rows, seen=seen, table=table, queue=queue) == 3
    assert rows == [[1, 2, 3], [1, 2, 3], [9]]
    assert rows[0] is rows[1] is shared
    assert seen == {1, 7}
    assert table["rows"] is rows
    assert queue == collections.deque([1, 3])
    assert queue.maxlen == 2


def test_a_returned_argument_is_the_callers_own_object() -> None:
    def same(value: Any) -> Any:
        return [value]

    mine = [1]
    with connected(same) as (_, remote):
        assert remote(mine)[0] is mine


def test_exceptions_arrive_as_their_builtin_class() -> None:
    class SpecialError(KeyError):
        pass

    def fail(values: list[int]) -> None:
        values.append(1)
        raise SpecialError("what")

    mine: list[int] = []
    with connected(fail) as (peer, remote):
        with pytest.raises(KeyError, match="what") as caught:
            remote(mine)
        assert type(caught.value) is KeyError
        assert peer.remote_errors[0][0] is caught.value
    assert mine == [1]


def test_functions_and_iterators_are_called_where_they_live() -> None:
    def make(factor: int) -> Callable[[int], Iterator[int]]:
        return lambda num: (factor * i for i in range(num))

    with connected(make) as (_, remote):
        triples = remote(3)
        assert list(triples(4)) == [0, 3, 6, 9]
        assert next(triples(1)) == 0


def test_the_callers_functions_can_be_called_back() -> None:
    def apply(function: Callable[[int], int], values: list[int]) -> list[int]:
        return [function(value) for value in values]

    with connected(apply) as (_, remote):
        assert remote(lambda value: value + remote(abs, [-1])[0], [1, 2]) == [2, 3]


def test_a_result_that_cannot_cross_leaves_no_verdict() -> None:
    def lie(_: int) -> Any:
        return _AlwaysEqual()

    with connected(lie) as (peer, remote):
        with pytest.raises(Unverifiable, match="_AlwaysEqual"):
            remote(1)
        assert peer.refusal is not None


def test_too_long_a_value_is_refused_before_it_is_sent() -> None:
    def grow() -> str:
        return "x" * (20 << 20)

    with connected(grow) as (_, remote), pytest.raises(Unverifiable, match="bytes"):
        remote()
