"""Locks by key, taken all at once: no global lock, no order to get wrong, no deadlock.

A request names everything that it will touch (layer ids, targets) and gets all of it or waits.
Waiters are served in the order they came, except that one whose keys are free does not wait behind
one whose keys are not, unless they share a key. The wait ends with the deadline or a cancel.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vsock.deadline import Deadline

__all__ = ("KeyLocks",)

Key = tuple[str, str]
#: Stands for every key.
_ALL: Key = ("", "")


class _Waiter:
    def __init__(self, keys: frozenset[Key]) -> None:
        self.keys = keys
        self.granted = False
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC)


class KeyLocks:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: set[Key] = set()
        self._waiting: list[_Waiter] = []

    @contextmanager
    def hold(self, keys: Iterable[Key], deadline: Deadline, step: str = "lock") -> Iterator[None]:
        """Hold all ``keys``, (kind, name) pairs, for the length of the block.

        Raises:
            CallError: ``timeout`` or ``cancelled``; nothing is held then.
        """
        wanted = frozenset(keys)
        self._acquire(wanted, deadline, step)
        try:
            yield
        finally:
            with self._lock:
                self._held -= wanted
                self._grant()

    @contextmanager
    def hold_all(self, deadline: Deadline, step: str = "lock") -> Iterator[None]:
        """Hold every key there could be: nothing else is held for the length of the block.

        Whoever holds keys may need more of them to end, so this waits behind all others.

        Raises:
            CallError: ``timeout`` or ``cancelled``; nothing is held then.
        """
        with self.hold((_ALL,), deadline, step):
            yield

    def is_held(self, key: Key) -> bool:
        """Return whether a request holds the key now."""
        with self._lock:
            return key in self._held

    def _acquire(self, wanted: frozenset[Key], deadline: Deadline, step: str) -> None:
        with self._lock:
            if not self._are_held(wanted) and not any(w.keys & wanted for w in self._waiting):
                self._held |= wanted
                return
            waiter = _Waiter(wanted)
            self._waiting.append(waiter)
        try:
            deadline.wait([waiter.wake_fd], step)
        except BaseException:
            self._abandon(waiter)
            raise
        finally:
            os.close(waiter.wake_fd)

    def _are_held(self, wanted: frozenset[Key]) -> bool:
        if _ALL in wanted:
            return bool(self._held)
        return _ALL in self._held or bool(self._held & wanted)

    def _abandon(self, waiter: _Waiter) -> None:
        """Leave the queue; give back what was granted in the same moment."""
        with self._lock:
            if waiter.granted:
                self._held -= waiter.keys
            else:
                self._waiting.remove(waiter)
            self._grant()

    def _grant(self) -> None:
        """Grant every waiter whose keys are free; the caller holds the lock."""
        blocked: set[Key] = set()
        for waiter in list(self._waiting):
            if self._are_held(waiter.keys) or waiter.keys & blocked:
                blocked |= waiter.keys
                continue
            self._held |= waiter.keys
            self._waiting.remove(waiter)
            waiter.granted = True
            os.eventfd_write(waiter.wake_fd, 1)
