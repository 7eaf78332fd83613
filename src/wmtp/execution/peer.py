"""The two ends of the channel between tester and candidate, and calls across it.

Both ends are the same: each can call the functions that the other has handed out, also while it is being
called, so that a test may pass a function of its own. Runs in bare interpreters, like `wire`.

A frame is four bytes of length, one byte that tells the kind, and the message: CALL (handle, arguments,
keywords), RETURN a value, RAISE (name of a built-in exception, arguments, text for people), REFUSE a reason
in plain text, QUIT.
"""

from __future__ import annotations

import builtins
import posix

from wmtp.execution.wire import GarbledMessageError, Proxy, UncarriableError, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

MAX_FRAME_BYTES = 16 << 20
CALL, RETURN, RAISE, REFUSE, QUIT = b"C", b"R", b"X", b"U", b"Q"
LOAD = 0  # the handle of the candidate's first function: load the program, tell what the given names are

_EXCEPTIONS: dict[str, type[BaseException]] = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and not name.endswith("Group")
}


class ChannelClosedError(BaseException):  # not to be taken for an exception that a test expects
    """The other end is gone."""


class ProgramEndedError(BaseException):
    """The program asked for its own end: what tests that catch everything must not take for an exception."""


class Unverifiable(BaseException):  # tests must not catch it with `except Exception`
    """The tests need an object that cannot cross, so nothing can be said from outside the sandbox."""


class RemoteFunction(Proxy):
    """A function at the other end. Calling it sends the arguments and waits for the answer."""

    def __init__(self, peer: Peer, handle: int, name: str) -> None:
        self.handle = handle
        self._peer = peer
        self.__name__ = self.__qualname__ = name

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - see the class
        try:
            return self._peer.call(self.handle, args, kwargs)
        except StopIteration as error:  # would end a `map` over the function as if there were no more values
            raise RuntimeError("the function raised StopIteration") from error

    def __getattr__(self, name: str) -> Any:
        return self._peer.refuse_attribute("function", name)

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"


class RemoteIterator(Proxy):
    """An iterator or generator at the other end, asked for one value at a time."""

    def __init__(self, peer: Peer, handle: int) -> None:
        self.handle = handle
        self._peer = peer

    def __iter__(self) -> RemoteIterator:
        return self

    def __next__(self) -> Any:
        return self._peer.call(self.handle, (), {})

    def __getattr__(self, name: str) -> Any:
        return self._peer.refuse_attribute("iterator", name)


class Peer:
    """One end of the channel.

    Args:
        read_fd: where the other end's messages arrive.
        write_fd: where messages to the other end go.
        describe: text for people about an exception that is sent.

    Attributes:
        refusal: why a value could not be carried, once that has happened; then no verdict is possible.
        failure: what ended the channel, once that has happened. Tests can catch anything, so it is kept:
            after an `except:` a program that ended itself would look like one that raised.
        remote_errors: the exceptions raised here that came from the other end, with the text sent along.
    """

    def __init__(self, read_fd: int, write_fd: int, describe: Callable[[BaseException], str] = repr) -> None:
        self.describe = describe
        self.refusal: str | None = None
        self.failure: ChannelClosedError | GarbledMessageError | ProgramEndedError | None = None
        self.remote_errors: list[tuple[BaseException, str]] = []
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._exports: list[tuple[Any, bool]] = []
        self._handles: dict[int, int] = {}
        self._proxies: dict[int, RemoteFunction | RemoteIterator] = {}

    def export(self, value: Any, *, is_iterator: bool) -> int:
        """Keep a function or iterator and give its handle."""
        handle = self._handles.get(id(value))
        if handle is None:
            handle = self._handles[id(value)] = len(self._exports)
            self._exports.append((value, is_iterator))
        return handle

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

    def check(self, value: Any) -> None:
        """Raise `UncarriableError` when a value, with all it holds, cannot be carried."""
        encode(self, value, [], [])

    def call(self, handle: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the other end and wait; raises what it raised.

        Raises:
            Unverifiable: an argument or the result cannot be carried.
            ChannelClosedError, ProgramEndedError, GarbledMessageError: the other end is gone, wants to end,
                or does not keep to the protocol; so does every further call.
        """
        if self.failure is not None:
            raise self.failure
        try:
            return self._call(handle, args, kwargs)
        except (ChannelClosedError, ProgramEndedError, GarbledMessageError) as error:
            self.failure = self.failure or error
            raise

    def _call(self, handle: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sent: list[Any] = []
        try:
            payload = self._encode((handle, args, tuple(kwargs.items())), sent, [])
        except UncarriableError as error:
            self._refuse(f"an argument is {error}")
        self.send(CALL, payload)
        while True:
            kind, data = self.receive()
            if kind == CALL:
                self.serve(data)
            elif kind == RETURN:
                return decode(self, data, sent)[0]
            elif kind == RAISE:
                self._raise(decode(self, data, sent)[0])
            elif kind == REFUSE:
                self._refuse(f"the result is {data[:200].decode('utf-8', 'replace')}")
            else:
                raise GarbledMessageError(f"unknown message {kind!r}")

    def serve(self, data: bytes) -> None:
        """Execute one call of the other end and answer it."""
        root, containers, records = decode(self, data, [])
        try:
            handle, args, kwargs = root
            function, is_iterator = self._exports[handle]
            keywords = dict(kwargs)
        except (TypeError, ValueError, IndexError) as error:
            raise GarbledMessageError(f"not a call: {error}") from error
        try:
            result = next(function) if is_iterator else function(*args, **keywords)
        except (ChannelClosedError, ProgramEndedError, GarbledMessageError):
            raise
        except Unverifiable as reason:
            self.send(REFUSE, str(reason).encode("utf-8", "replace"))
            raise
        except BaseException as error:
            self._answer_error(error, containers, records)
        else:
            self._answer(result, containers, records)

    def _answer(self, value: Any, containers: list[Any], records: list[bytes]) -> None:
        """Send a result, with the containers of the call that have changed since they came."""
        try:
            payload = self._encode(value, containers, records)
        except UncarriableError as error:
            self.refusal = self.refusal or str(error)
            self.send(REFUSE, str(error).encode("utf-8", "replace"))
        else:
            self.send(RETURN, payload)

    def _answer_error(self, error: BaseException, containers: list[Any], records: list[bytes]) -> None:
        """Send an exception as its nearest built-in class."""
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
        text = self.describe(error)
        try:
            payload = self._encode((name, error.args, text), list(containers), records)
        except UncarriableError:  # in the arguments of the exception, or in those of the call
            payload = self._encode((name, (text,), text), [], [])
        self.send(RAISE, payload)

    def _encode(self, value: Any, containers: list[Any], records: list[bytes]) -> bytes:
        payload = encode(self, value, containers, records)
        if len(payload) >= MAX_FRAME_BYTES:
            raise UncarriableError(f"a value of {len(payload)} bytes")
        return payload

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send one frame."""
        view = memoryview(b"%b%b%b" % ((len(payload) + 1).to_bytes(4, "big"), kind, payload))
        try:
            while view:
                view = view[posix.write(self._write_fd, view) :]
        except BrokenPipeError as error:
            raise ChannelClosedError("the other end is gone") from error

    def receive(self) -> tuple[bytes, bytes]:
        """Wait for one frame; gives its kind and its message."""
        length = int.from_bytes(self._read(4), "big")
        if not 0 < length <= MAX_FRAME_BYTES:
            raise GarbledMessageError(f"a frame of {length} bytes")
        frame = self._read(length)
        return frame[:1], frame[1:]

    def _read(self, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = posix.read(self._read_fd, min(length, 1 << 20))
            if not part:
                raise ChannelClosedError("the other end is gone")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def refuse_attribute(self, kind: str, name: str) -> NoReturn:
        """An attribute of a stand-in: Python's own probing gets the usual error, the tests get no verdict."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"the attribute {name} of a {kind}")

    def _refuse(self, reason: str) -> NoReturn:
        self.refusal = self.refusal or reason
        raise Unverifiable(reason)

    def _raise(self, sent: Any) -> NoReturn:
        if type(sent) is not tuple or [type(part) for part in sent] != [str, tuple, str]:
            raise GarbledMessageError("an exception is malformed")
        name, args, text = sent
        if not issubclass(_EXCEPTIONS.get(name, Exception), Exception):  # SystemExit and its like
            raise ProgramEndedError(text)
        try:
            error = _EXCEPTIONS.get(name, Exception)(*args)
        except Exception:  # some classes want arguments of a certain form
            error = Exception(*args)
        self.remote_errors.append((error, text))
        raise error
