"""Following something that goes on, without ever holding it up."""

import os
import threading
from collections import deque

from vsock.deadline import Deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Generic, TypeVar

    Item = TypeVar("Item")
else:
    Item = object
    Generic = {Item: object}

__all__ = ("Queue",)

_MAX_ITEMS = 1000


class Queue(Generic[Item]):
    """What was put and not yet taken; beyond a bound the oldest go, and are counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()
        self._dropped = 0
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def put(self, item: Item) -> None:
        """Never waits. From any thread."""
        with self._lock:
            if self._fd < 0:
                return
            self._items.append(item)
            if len(self._items) > _MAX_ITEMS:
                self._items.popleft()
                self._dropped += 1
            os.eventfd_write(self._fd, 1)

    def take(self, deadline: Deadline, step: str) -> "tuple[list[Item], int]":
        """Wait; return what has come, and how many were dropped before it.

        Raises:
            CallError: ``cancelled`` or ``timeout``.
        """
        deadline.wait((self._fd,), step)
        os.eventfd_read(self._fd)
        with self._lock:
            items, dropped = list(self._items), self._dropped
            self._items.clear()
            self._dropped = 0
        return items, dropped

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)
            self._fd = -1
