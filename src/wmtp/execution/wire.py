"""The encoding of values between tester and candidate: exact built-in values, never live objects.

The same file runs at both ends, in bare interpreters without this package installed, so it imports nothing
but `sys` until a value asks for more.

A message is a root value and a table of the mutable containers that the root reaches, each written once and
referred to by its number, so that shared and cyclic structures keep their shape. The answer to a call also
carries those containers of the call whose content has changed, which updates the caller's own containers in
place. Functions and iterators are not carried: they stay where they are and a numbered handle is sent, on
which the other end can call (`peer`). Any other object is refused with `UncarriableError`.

The reader trusts nothing: it builds only types named here, checks every length against the bytes there are,
and raises `GarbledMessageError` for the rest. It never unpickles, imports by name or evaluates.

Tags, one byte each: N None, T True, F False, E Ellipsis, i int, f float, c complex, s str, b bytes, ( tuple,
{ frozenset, k v m keys, values and items of a dictionary, r range, t built-in type, @ container of the table,
h handle of the sender, p handle of the receiver. Numbers are hexadecimal and end with a semicolon, lengths
are decimal and end with a colon.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Protocol

    class Link(Protocol):
        """What the encoding needs from the end of the channel that it works for."""

        def export(self, value: Any, *, is_iterator: bool) -> int:
            """Keep a function or iterator and give its handle."""

        def exported(self, handle: int) -> Any:
            """The function or iterator behind a handle of this end."""

        def proxy(self, handle: int, name: str, *, is_iterator: bool) -> Any:
            """The stand-in for a handle of the other end."""


MAX_NESTING = 100  # of tuples and frozensets; lists and dictionaries nest without bound
_BUILTIN_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, range)
}
_BUILTIN_TYPES |= {"object": object, "NoneType": type(None)}
_EMPTY: dict[Any, Any] = {}
_SEQUENCES: dict[type, bytes] = {tuple: b"(", frozenset: b"{"}
_SEQUENCES |= {type(_EMPTY.keys()): b"k", type(_EMPTY.values()): b"v", type(_EMPTY.items()): b"m"}
_MAPPINGS = b"dOCD"  # kinds of containers that hold pairs


class GarbledMessageError(BaseException):  # not to be taken for an exception that a test expects
    """The other end sent something that is no message."""


class UncarriableError(Exception):
    """A value that cannot cross: an object of a class that is not built in."""


class Proxy:
    """A stand-in for something that stays at the other end; `handle` is its number there."""

    handle: int


def encode(link: Link, root: Any, containers: list[Any], records: list[bytes]) -> bytes:
    """Encode one message.

    Args:
        link: this end of the channel.
        root: the value to send.
        containers: mutable containers that both ends know already, by number; new ones are appended.
        records: the content of the known ones as the other end has it.

    Raises:
        UncarriableError: the root reaches an object that cannot be carried.
    """
    writer = _Writer(link, containers)
    num_known = len(containers)
    body: list[bytes] = []
    writer.value(root, body)
    changed: list[bytes] = []
    for number, known in enumerate(records):
        record = writer.record(containers[number])
        if record != known:
            changed.append(b"%x;%b" % (number, record))
    new = [writer.record(container) for container in _growing(containers, num_known)]
    kinds = b"".join(writer.kinds[type(container)] for container in containers[num_known:])
    return b"".join((b"%d:" % len(kinds), kinds, *body, b"%d:" % len(changed), *changed, *new))


def decode(link: Link, data: bytes, known: list[Any]) -> tuple[Any, list[Any], list[bytes]]:
    """Decode one message and bring the known containers up to date.

    Returns:
        The root, all containers by number, and the content of the new ones as it came.

    Raises:
        GarbledMessageError: the data is no message.
    """
    try:
        return _decode_unchecked(_Reader(link, data), known)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise GarbledMessageError(f"not a message: {error}") from error


def _decode_unchecked(reader: _Reader, known: list[Any]) -> tuple[Any, list[Any], list[bytes]]:
    kinds = reader.take()
    if set(kinds) & set(b"OCDq"):
        import collections  # noqa: F401 - makes these kinds known
    reader.kinds = _container_kinds()
    types = {ord(letter): container for container, letter in reader.kinds.items()}
    shells = [types[kind]() for kind in kinds]
    reader.containers = known + shells
    root = reader.value()
    for _ in range(reader.count()):
        number = reader.number()
        reader.fill(known[number])
    records: list[bytes] = []
    for shell in shells:
        start = reader.position
        reader.fill(shell)
        records.append(reader.data[start : reader.position])
    if reader.position != len(reader.data):
        raise GarbledMessageError("bytes are left over")
    return root, reader.containers, records


def _container_kinds() -> dict[type, bytes]:
    """Kinds of mutable containers; those of `collections` once somebody has imported it, for it is slow to
    load."""
    kinds: dict[type, bytes] = {list: b"l", dict: b"d", set: b"s", bytearray: b"b"}
    if "collections" in sys.modules:
        import collections

        kinds[collections.OrderedDict] = b"O"
        kinds[collections.Counter] = b"C"
        kinds[collections.defaultdict] = b"D"
        kinds[collections.deque] = b"q"
    return kinds


def _growing(items: list[Any], start: int) -> Iterator[Any]:
    """Iterate over a list that grows meanwhile."""
    position = start
    while position < len(items):
        yield items[position]
        position += 1


class _Writer:
    """Encodes values; `containers` grows while they are written."""

    def __init__(self, link: Link, containers: list[Any]) -> None:
        self.link = link
        self.containers = containers
        self.numbers = {id(container): number for number, container in enumerate(containers)}
        self.kinds = _container_kinds()
        self.depth = 0

    def value(self, value: Any, out: list[bytes]) -> None:
        """Append the encoding of any value."""
        kind = type(value)
        if kind is int:
            out.append(b"i%x;" % value)
        elif kind is str:
            data = value.encode("utf-8", "surrogatepass")
            out.append(b"s%d:%b" % (len(data), data))
        elif kind is float:
            out.append(b"f%b;" % value.hex().encode())
        elif kind is bool:
            out.append(b"T" if value else b"F")
        elif value is None:
            out.append(b"N")
        elif kind in self.kinds:
            number = self.numbers.get(id(value))
            if number is None:
                number = self.numbers[id(value)] = len(self.containers)
                self.containers.append(value)
            out.append(b"@%x;" % number)
        elif kind in _SEQUENCES:
            self._nested(_SEQUENCES[kind], value, out)
        else:
            out.append(self._rare(value, kind))

    def _nested(self, tag: bytes, values: Any, out: list[bytes]) -> None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise UncarriableError(f"nested more than {MAX_NESTING} tuples deep")
        out.append(b"%b%d:" % (tag, len(values)))
        for item in values:
            self.value(item, out)
        self.depth -= 1

    def _rare(self, value: Any, kind: type) -> bytes:
        if kind is bytes:
            return b"b%d:%b" % (len(value), value)
        if kind is complex:
            return b"c%b,%b;" % (value.real.hex().encode(), value.imag.hex().encode())
        if kind is range:
            return b"r%x,%x,%x;" % (value.start, value.stop, value.step)
        if value is ...:
            return b"E"
        if isinstance(value, type):
            if _BUILTIN_TYPES.get(value.__name__) is value:
                return b"t%b;" % value.__name__.encode()
            raise UncarriableError(f"the class {value.__name__}")
        if issubclass(kind, Proxy):
            return b"p%x;" % value.handle
        if hasattr(kind, "__next__"):
            return b"hi%x;0:" % self.link.export(value, is_iterator=True)
        if callable(value) and kind.__module__ in ("builtins", "functools"):
            name = (kind if kind.__name__ == "partial" else value).__name__.encode()
            return b"hc%x;%d:%b" % (self.link.export(value, is_iterator=False), len(name), name)
        raise UncarriableError(f"an object of type {kind.__name__}")

    def record(self, container: Any) -> bytes:
        """Encode the content of one container, other containers by number."""
        kind = self.kinds[type(container)]
        if kind == b"b":
            return b"%d:%b" % (len(container), bytes(container))
        out: list[bytes] = []
        if kind == b"D":
            self.value(container.default_factory, out)
        elif kind == b"q":
            self.value(container.maxlen, out)
        out.append(b"%d:" % len(container))
        if kind in _MAPPINGS:
            for key, item in container.items():
                self.value(key, out)
                self.value(item, out)
        else:
            for item in container:
                self.value(item, out)
        return b"".join(out)


def _sequence(tag: bytes, items: list[Any]) -> Any:
    """What was taken apart for the tag; a view of a dictionary gets a dictionary of its own."""
    if tag == b"(":
        return tuple(items)
    if tag == b"{":
        return frozenset(items)
    if tag == b"k":
        return dict.fromkeys(items).keys()
    if tag == b"v":
        return dict(enumerate(items)).values()
    return dict(items).items()


class _Reader:
    """Decodes values one after the other."""

    def __init__(self, link: Link, data: bytes) -> None:
        self.link = link
        self.data = data
        self.position = 0
        self.containers: list[Any] = []
        self.kinds: dict[type, bytes] = {}
        self.depth = 0

    def until(self, mark: bytes) -> bytes:
        """The bytes up to the mark, which is skipped."""
        end = self.data.index(mark, self.position)
        text = self.data[self.position : end]
        self.position = end + 1
        return text

    def number(self) -> int:
        """A number that cannot be negative: Python would take it for a place counted from the end."""
        number = int(self.until(b";"), 16)
        if number < 0:
            raise GarbledMessageError("a negative number")
        return number

    def count(self) -> int:
        """A length, which can never exceed the bytes that are left."""
        count = int(self.until(b":"))
        if not 0 <= count <= len(self.data) - self.position:
            raise GarbledMessageError("a length runs past the end")
        return count

    def take(self) -> bytes:
        """A length and that many bytes."""
        length = self.count()
        self.position += length
        return self.data[self.position - length : self.position]

    def value(self) -> Any:
        """Decode any value."""
        tag = self.data[self.position : self.position + 1]
        self.position += 1
        if tag == b"i":
            return int(self.until(b";"), 16)
        if tag == b"s":
            return self.take().decode("utf-8", "surrogatepass")
        if tag == b"f":
            return float.fromhex(self.until(b";").decode())
        if tag == b"@":
            return self.containers[self.number()]
        if tag == b"T" or tag == b"F":
            return tag == b"T"
        if tag == b"N":
            return None
        if tag in _SEQUENCES.values():
            self.depth += 1
            if self.depth > MAX_NESTING:
                raise GarbledMessageError("nested too deeply")
            items = [self.value() for _ in range(self.count())]
            self.depth -= 1
            return _sequence(tag, items)
        return self._rare(tag)

    def _rare(self, tag: bytes) -> Any:
        if tag == b"b":
            return self.take()
        if tag == b"c":
            real, imaginary = self.until(b";").decode().split(",")
            return complex(float.fromhex(real), float.fromhex(imaginary))
        if tag == b"r":
            start, stop, step = (int(part, 16) for part in self.until(b";").split(b","))
            return range(start, stop, step)
        if tag == b"E":
            return ...
        if tag == b"t":
            return _BUILTIN_TYPES[self.until(b";").decode()]
        if tag == b"p":
            return self.link.exported(self.number())
        if tag == b"h":
            is_iterator = self.data[self.position] == ord("i")
            self.position += 1
            handle, name = self.number(), self.take().decode("utf-8", "replace")
            return self.link.proxy(handle, name, is_iterator=is_iterator)
        raise GarbledMessageError(f"unknown tag {tag!r}")

    def fill(self, container: Any) -> None:
        """Replace the content of a container by the record at this place."""
        kind = self.kinds[type(container)]
        if kind == b"b":
            container[:] = self.take()
            return
        factory = self.value() if kind == b"D" else None
        bound = self.value() if kind == b"q" else None
        num_values = self.count() * (2 if kind in _MAPPINGS else 1)
        values = [self.value() for _ in range(num_values)]
        if kind == b"l":
            container[:] = values
        elif kind == b"s":
            container.clear()
            container.update(values)
        elif kind == b"q":
            container.__init__(values, bound)
        else:
            container.clear()
            if kind == b"D":
                if factory is not None and not callable(factory):
                    raise GarbledMessageError("the factory of a defaultdict cannot be called")
                container.default_factory = factory
            for position in range(0, num_values, 2):
                container[values[position]] = values[position + 1]
