"""The guest's own file tree as a place to look into: for the debug console alone.

No request from a connection gets here; those name a layer or an overlay.
"""

import os
from collections.abc import Callable, Mapping

from guestagent.engine.transaction import Transaction
from guestagent.inspect.methods import LOOKS, STREAMS
from guestagent.inspect.place import Place
from guestagent.inspect.sink import Sink
from guestagent.storage.openat import Root
from vsock.deadline import Deadline

__all__ = ("GuestRoot",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from guestagent.api.inspect import StreamRequest
    from guestagent.api.request import Request
    from vsock.record import Record

    R = TypeVar("R", bound=Record)
    Item = TypeVar("Item")


class GuestRoot:
    """Answers the ``fs.`` requests about a path as of the guest's own root, whichever layer or
    overlay they name: regular files and directories are opened, and no magic link is followed."""

    def __init__(self, operation: Callable[[Deadline], Transaction]) -> None:
        """``operation`` begins a request."""
        self._operation = operation

    def call(self, request: "Request[R]", *, deadline: Deadline) -> "R":
        """Answer a request.

        Raises:
            CallError: it failed, or ``deadline`` is over.
        """
        return self._answer(request, deadline, lambda content: None)

    def stream(
        self,
        request: "StreamRequest[R, Item]",
        take: "Callable[[Item], object]",
        *,
        deadline: Deadline,
    ) -> "R":
        """Answer a request whose answer comes in chunks: ``take`` gets each item.

        Raises:
            CallError: as of ``call``, or raised by ``take``.
        """

        def take_chunk(chunk: Mapping[str, object]) -> None:
            for item in request.items(chunk):
                take(item)

        return self._answer(request, deadline, take_chunk)

    def _answer(
        self,
        request: "Request[R]",
        deadline: Deadline,
        take: Callable[[Mapping[str, object]], None],
    ) -> "R":
        kind = type(request)
        with _GuestPlace() as place:
            if kind in LOOKS:
                return LOOKS[kind](place, request)  # type: ignore[return-value]
            op = self._operation(deadline)
            return STREAMS[kind](place, request, op, _Chunks(take))  # type: ignore[return-value]


class _GuestPlace(Place):
    """The guest as a place, as a layer is one."""

    def __init__(self) -> None:
        self.name = "the guest"
        self.mount_point = "/"
        self._layers = ()
        self.root = _TopDirectory()


class _TopDirectory(Root):
    """The guest's root, with everything that is mounted below it."""

    def __init__(self) -> None:
        self._directory_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.fd = os.dup(self._directory_fd)
        self.is_clone = False


class _Chunks(Sink):
    """Hands each piece of an answer on as a chunk of its own."""

    def __init__(self, take: Callable[[Mapping[str, object]], None]) -> None:
        self._take = take

    def data(self, data: "bytes | memoryview") -> None:
        self._take({"data": bytes(data)})

    def entry(self, *fields: object) -> None:
        self._take({"entries": [list(fields)]})

    def finish(self) -> int:
        return 0

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        return
