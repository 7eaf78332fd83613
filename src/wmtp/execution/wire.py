"""The channel between the tester and the candidate: exact built-in values, never live objects.

The same file runs at both ends, in bare interpreters without this package installed, so it imports nothing
but `sys` and `posix` until a value asks for more.

A message is one length-prefixed frame. It holds a root value and a table of the mutable containers that the
root reaches, each written once and referred to by its number, so that shared and cyclic structures keep their
shape. The answer to a call carries the containers of the call whose content changed, and the caller's own
containers are updated in place. Functions and iterators are not carried: they stay where they are and a
numbered handle is sent, on which the other end can call. Any other object is refused with `UncarriableError`.

The reader trusts nothing: it builds only types named here, checks every length against the bytes there are,
and raises `GarbledMessageError` for the rest. It never unpickles, imports by name or evaluates.

Tags, one byte each: N None, T True, F False, E Ellipsis, i int, f float, c complex, s str, b bytes, ( tuple,
{ frozenset, r range, t built-in type, @ container of the table, h handle of the sender, p handle of the
receiver.
"""

from __future__ import annotations

import builtins
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_MESSAGE_BYTES = 64 << 20
MAX_NESTING = 100  # of tuples and frozensets; lists and dictionaries nest without bound
CALL, RETURN, RAISE, REFUSE, QUIT = b"C", b"R", b"X", b"U", b"Q"
LOAD = 0  # the handle of the candidate's first function: load the program, tell what the given names are

_BUILTIN_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        tuple,
        list,
        dict,
        set,
        frozenset,
        range,
        object,
    )
}
_BUILTIN_TYPES["NoneType"] = type(None)
_EXCEPTIONS: dict[str, type[BaseException]] = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and not name.endswith("Group")
}


class ChannelClosedError(Exception):
    """The other end is gone."""


class GarbledMessageError(Exception):
    """The other end sent something that is no message."""


class UncarriableError(Exception):
    """A value that cannot cross: an object of a class that is not built in."""


class Unverifiable(BaseException):
    """The tests need an object that cannot cross, so nothing can be said from outside the sandbox."""


class RemoteFunction:
    """A function at the other end. Calling it sends the arguments and waits for the answer."""

    def __init__(self, peer: Peer, handle: int, name: str) -> None:
        self._peer = peer
        self._handle = handle
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.call(self._handle, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._peer.refuse_attribute("function", name)

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"


class RemoteIterator:
    """An iterator or generator at the other end, asked for one value at a time."""

    def __init__(self, peer: Peer, handle: int) -> None:
        self._peer = peer
        self._handle = handle

    def __iter__(self) -> RemoteIterator:
        return self

    def __next__(self) -> Any:
        return self._peer.call(self._handle, (), {})

    def __getattr__(self, name: str) -> Any:
        return self._peer.refuse_attribute("iterator", name)


def _container_types() -> dict[type, bytes]:
    """Kinds of mutable containers; those of `collections` only once somebody has imported it (it is slow to
    load)."""
    kinds: dict[type, bytes] = {list: b"l", dict: b"d", set: b"s", bytearray: b"b"}
    if "collections" in sys.modules:
        import collections

        kinds[collections.OrderedDict] = b"O"
        kinds[collections.Counter] = b"C"
        kinds[collections.defaultdict] = b"D"
        kinds[collections.deque] = b"q"
    return kinds


def _new_container(kind: int) -> Any:
    if kind == 108:
        return []
    if kind == 100:
        return {}
    if kind == 115:
        return set()
    if kind == 98:
        return bytearray()
    import collections

    if kind == 79:
        return collections.OrderedDict()
    if kind == 67:
        return collections.Counter()
    if kind == 68:
        return collections.defaultdict()
    if kind == 113:
        return collections.deque()
    raise GarbledMessageError(f"unknown container kind {kind}")


class _Writer:
    """Encodes one message; `containers` grows while values are written."""

    def __init__(self, peer: Peer, containers: list[Any]) -> None:
        self.peer = peer
        self.containers = containers
        self.index = {id(container): i for i, container in enumerate(containers)}
        self.kinds = _container_types()
        self.depth = 0

    def value(self, value: Any, out: list[bytes]) -> None:
        """Append the encoding of any value."""
        kind = type(value)
        if value is None:
            out.append(b"N")
        elif kind is bool:
            out.append(b"T" if value else b"F")
        elif kind is int:
            out.append(b"i%x;" % value)
        elif kind is str:
            data = value.encode("utf-8", "surrogatepass")
            out.append(b"s%d:" % len(data))
            out.append(data)
        elif kind is float:
            out.append(b"f%b;" % value.hex().encode())
        elif kind in self.kinds:
            number = self.index.get(id(value))
            if number is None:
                number = self.index[id(value)] = len(self.containers)
                self.containers.append(value)
            out.append(b"@%x;" % number)
        elif kind is tuple or kind is frozenset:
            self._nested(b"(" if kind is tuple else b"{", value, out)
        else:
            self._rare(value, kind, out)

    def _nested(self, tag: bytes, values: Any, out: list[bytes]) -> None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise UncarriableError(f"tuples nested deeper than {MAX_NESTING}")
        out.append(b"%b%d:" % (tag, len(values)))
        for item in values:
            self.value(item, out)
        self.depth -= 1

    def _rare(self, value: Any, kind: type, out: list[bytes]) -> None:
        if kind is bytes:
            out.append(b"b%d:" % len(value))
            out.append(value)
        elif kind is complex:
            out.append(b"c%b,%b;" % (value.real.hex().encode(), value.imag.hex().encode()))
        elif kind is range:
            out.append(b"r%x,%x,%x;" % (value.start, value.stop, value.step))
        elif value is ...:
            out.append(b"E")
        elif kind is type and _BUILTIN_TYPES.get(value.__name__) is value:
            out.append(b"t%b;" % value.__name__.encode())
        elif kind in (RemoteFunction, RemoteIterator):
            out.append(b"p%x;" % value._handle)
        elif isinstance(value, type):
            raise UncarriableError(f"the class {value.__name__}")
        elif hasattr(kind, "__next__"):
            out.append(b"hi%x;0:" % self.peer.export(value, is_iterator=True))
        elif callable(value) and kind.__module__ in ("builtins", "functools"):
            data = kind.__name__.encode() if kind.__name__ == "partial" else value.__name__.encode()
            out.append(b"hc%x;%d:%b" % (self.peer.export(value, is_iterator=False), len(data), data))
        else:
            raise UncarriableError(f"an object of type {kind.__name__}")

    def record(self, container: Any) -> bytes:
        """Encode the content of one container, other containers by number."""
        out: list[bytes] = []
        kind = self.kinds[type(container)]
        if kind == b"b":
            return b"%d:%b" % (len(container), bytes(container))
        if kind == b"D":
            self.value(container.default_factory, out)
        elif kind == b"q":
            self.value(container.maxlen, out)
        out.append(b"%d:" % len(container))
        if kind in b"dOCD":
            for key, item in container.items():
                self.value(key, out)
                self.value(item, out)
        else:
            for item in container:
                self.value(item, out)
        return b"".join(out)


class _Reader:
    """Decodes one message."""

    def __init__(self, peer: Peer, data: bytes, position: int, containers: list[Any]) -> None:
        self.peer = peer
        self.data = data
        self.position = position
        self.containers = containers
        self.depth = 0

    def until(self, mark: bytes) -> bytes:
        """The bytes up to the mark, which is skipped."""
        end = self.data.index(mark, self.position)
        text = self.data[self.position : end]
        self.position = end + 1
        return text

    def count(self) -> int:
        """A length, which can never exceed the bytes that are left."""
        number = int(self.until(b":"))
        if not 0 <= number <= len(self.data) - self.position:
            raise GarbledMessageError("a length runs past the end")
        return number

    def take(self) -> bytes:
        """A length and that many bytes."""
        length = self.count()
        self.position += length
        return self.data[self.position - length : self.position]

    def value(self) -> Any:
        """Decode any value."""
        tag = self.data[self.position]
        self.position += 1
        if tag == 105:
            return int(self.until(b";"), 16)
        if tag == 115:
            return self.take().decode("utf-8", "surrogatepass")
        if tag == 102:
            return float.fromhex(self.until(b";").decode())
        if tag == 64:
            return self.containers[self.index()]
        if tag == 84 or tag == 70:
            return tag == 84
        if tag == 78:
            return None
        if tag == 40 or tag == 123:
            self.depth += 1
            if self.depth > MAX_NESTING:
                raise GarbledMessageError("nested too deeply")
            items = [self.value() for _ in range(self.count())]
            self.depth -= 1
            return tuple(items) if tag == 40 else frozenset(items)
        return self._rare(tag)

    def index(self) -> int:
        """A number that cannot be negative."""
        number = int(self.until(b";"), 16)
        if number < 0:
            raise GarbledMessageError("a negative number")
        return number

    def _rare(self, tag: int) -> Any:
        if tag == 98:
            return self.take()
        if tag == 99:
            real, imaginary = self.until(b";").decode().split(",")
            return complex(float.fromhex(real), float.fromhex(imaginary))
        if tag == 114:
            start, stop, step = (int(part, 16) for part in self.until(b";").split(b","))
            return range(start, stop, step)
        if tag == 69:
            return ...
        if tag == 116:
            return _BUILTIN_TYPES[self.until(b";").decode()]
        if tag == 112:
            return self.peer.exported(self.index())
        if tag == 104:
            form = self.data[self.position]
            self.position += 1
            handle, name = self.index(), self.take().decode("utf-8", "replace")
            return self.peer.proxy(handle, name, is_iterator=form == 105)
        raise GarbledMessageError(f"unknown tag {tag}")

    def fill(self, container: Any) -> None:
        """Replace the content of a container by the record at this place."""
        if type(container) is bytearray:
            container[:] = self.take()
            return
        kind = _container_types()[type(container)]
        if kind == b"D":
            container.default_factory = self.value()
        bound = self.value() if kind == b"q" else None
        values = [self.value() for _ in range(self.count() * (2 if kind in b"dOCD" else 1))]
        if kind == b"l":
            container[:] = values
            return
        container.clear()
        if kind in b"dOCD":
            for key, item in zip(values[::2], values[1::2], strict=True):
                container[key] = item
        elif kind == b"s":
            container.update(values)
        else:
            import collections

            container.__init__(collections.deque(values), bound)


class Peer:
    """One end of the channel. Both ends can call functions that the other has handed out.

    Args:
        read_fd: where the other end's messages arrive.
        write_fd: where messages to the other end go.
        describe: text for people about an exception that is sent.
    """

    def __init__(self, read_fd: int, write_fd: int, describe: Callable[[BaseException], str] = repr) -> None:
        self.describe = describe
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._exports: list[tuple[Any, bool]] = []
        self._export_numbers: dict[int, int] = {}
        self._proxies: dict[int, RemoteFunction | RemoteIterator] = {}
        self.refusal: str | None = None
        self.remote_errors: list[tuple[BaseException, str]] = []

    def export(self, value: Any, *, is_iterator: bool) -> int:
        """Keep a function or iterator and give its handle."""
        number = self._export_numbers.get(id(value))
        if number is None:
            number = self._export_numbers[id(value)] = len(self._exports)
            self._exports.append((value, is_iterator))
        return number

    def check(self, value: Any) -> None:
        """Raise `UncarriableError` when a value, with all it holds, cannot be carried."""
        self._message(RETURN, value, _Writer(self, []), ())

    def exported(self, handle: int) -> Any:
        """The function or iterator behind a handle of this end."""
        return self._exports[handle][0]

    def proxy(self, handle: int, name: str, *, is_iterator: bool) -> RemoteFunction | RemoteIterator:
        """The stand-in for a handle of the other end; one handle always gives one object."""
        if handle not in self._proxies:
            self._proxies[handle] = (
                RemoteIterator(self, handle) if is_iterator else RemoteFunction(self, handle, name)
            )
        return self._proxies[handle]

    def call(self, handle: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the other end and wait; raises what it raised.

        Raises:
            Unverifiable: an argument or the result cannot be carried.
        """
        writer = _Writer(self, [])
        try:
            self.send(self._message(CALL, (handle, args, tuple(kwargs.items())), writer, ()))
        except UncarriableError as error:
            self._refuse(f"an argument is {error}")
        return self.wait(writer.containers)

    def wait(self, sent: list[Any]) -> Any:
        """Wait for the answer to a call that carried the containers `sent`, serving the other end's calls
        meanwhile."""
        while True:
            data = self.receive()
            kind = data[:1]
            if kind == CALL:
                self.serve(data)
            elif kind == RETURN:
                return self._open(data, sent)[0]
            elif kind == RAISE:
                self._raise(self._open(data, sent)[0])
            elif kind == REFUSE:
                self._refuse(f"the result is {data[1:200].decode('utf-8', 'replace')}")
            else:
                raise GarbledMessageError(f"unknown message {kind!r}")

    def serve(self, data: bytes) -> None:
        """Execute one call of the other end and answer it."""
        (handle, args, kwargs), containers, records = self._open(data, [])
        function, is_iterator = self._exports[handle]
        try:
            result = next(function) if is_iterator else function(*args, **dict(kwargs))
        except (ChannelClosedError, GarbledMessageError):
            raise
        except Unverifiable as reason:
            self.send(REFUSE + str(reason).encode("utf-8", "replace"))
            raise
        except BaseException as error:
            self.answer_error(error, self.describe(error), containers, records)
        else:
            self.answer(RETURN, result, containers, records)

    def answer(self, kind: bytes, value: Any, containers: list[Any], records: list[bytes]) -> None:
        """Send a result, with the containers of the call that have changed since they came."""
        try:
            payload = self._message(kind, value, _Writer(self, list(containers)), records)
        except UncarriableError as error:
            self.refusal = self.refusal or str(error)
            payload = REFUSE + str(error).encode("utf-8", "replace")
        self.send(payload)

    def answer_error(
        self, error: BaseException, text: str, containers: list[Any], records: list[bytes]
    ) -> None:
        """Send an exception as the name of its nearest built-in class, its arguments and a text for
        people."""
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
        try:
            payload = self._message(RAISE, (name, error.args, text), _Writer(self, list(containers)), records)
        except UncarriableError:
            payload = self._message(
                RAISE, (name, (str(error),), text), _Writer(self, list(containers)), records
            )
        self.send(payload)

    def send(self, payload: bytes) -> None:
        """Send one frame."""
        view = memoryview(len(payload).to_bytes(4, "big") + payload)
        try:
            while view:
                view = view[posix.write(self._write_fd, view) :]
        except BrokenPipeError as error:
            raise ChannelClosedError("the other end is gone") from error

    def receive(self) -> bytes:
        """Wait for one frame."""
        length = int.from_bytes(self._read(4), "big")
        if not 0 < length <= MAX_MESSAGE_BYTES:
            raise GarbledMessageError(f"a frame of {length} bytes")
        return self._read(length)

    def _read(self, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = posix.read(self._read_fd, min(length, 1 << 20))
            if not part:
                raise ChannelClosedError("the other end is gone")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _message(
        self, kind: bytes, root: Any, writer: _Writer, old: list[bytes] | tuple[bytes, ...]
    ) -> bytes:
        num_old = len(writer.containers)
        body: list[bytes] = []
        writer.value(root, body)
        changed: list[bytes] = []
        num_changed = 0
        records: list[bytes] = []
        for number, before in enumerate(old):
            record = writer.record(writer.containers[number])
            if record != before:
                num_changed += 1
                changed.append(b"%x;%b" % (number, record))
        for container in _growing(writer.containers, num_old):
            records.append(writer.record(container))
        kinds = b"".join(writer.kinds[type(container)] for container in writer.containers[num_old:])
        head = b"%b%d:%b" % (kind, len(kinds), kinds)
        return b"".join((head, *body, b"%d:" % num_changed, *changed, *records))

    def _open(self, data: bytes, known: list[Any]) -> tuple[Any, list[Any], list[bytes]]:
        try:
            return self._open_unchecked(data, known)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise GarbledMessageError(f"not a message: {error}") from error

    def _open_unchecked(self, data: bytes, known: list[Any]) -> tuple[Any, list[Any], list[bytes]]:
        reader = _Reader(self, data, 1, known)
        shells = [_new_container(kind) for kind in reader.take()]
        reader.containers = containers = known + shells
        root = reader.value()
        for _ in range(reader.count()):
            number = reader.index()
            reader.fill(known[number])
        records: list[bytes] = []
        for shell in shells:
            begin = reader.position
            reader.fill(shell)
            records.append(data[begin : reader.position])
        if reader.position != len(data):
            raise GarbledMessageError("bytes are left over")
        return root, containers, records

    def refuse_attribute(self, kind: str, name: str) -> None:
        """An attribute of a stand-in: Python's own probing gets the usual error, the tests get no verdict."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"the attribute {name} of a {kind}")

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason
        raise Unverifiable(reason)

    def _raise(self, sent: Any) -> None:
        if type(sent) is not tuple or [type(part) for part in sent] != [str, tuple, str]:
            raise GarbledMessageError("an exception is malformed")
        name, args, text = sent
        kind = _EXCEPTIONS.get(name, Exception)
        try:
            error = kind(*args)
        except Exception:  # some classes want arguments of a certain form
            error = Exception(*args)
        self.remote_errors.append((error, text))
        raise error


def _growing(items: list[Any], start: int) -> Any:
    """Iterate over a list that grows meanwhile."""
    position = start
    while position < len(items):
        yield items[position]
        position += 1
